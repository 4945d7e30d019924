"""Deterministic algorithms, for results that are the same bit for bit on a GPU too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The variable without which cuBLAS is not deterministic; read when CUDA is first used."""


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms only, if ``wanted``; afterwards all is as before.

    Of the fused attention kernels, flash attention has a deterministic backward pass, and the plain
    one is deterministic; the others are turned off. Rows are padded then: see ``backend_for``.
    """
    if not wanted:
        yield
        return
    cuda = torch.backends.cuda
    before = (
        torch.are_deterministic_algorithms_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        os.environ.get(WORKSPACE),
    )
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    cuda.enable_mem_efficient_sdp(False)
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cuda.enable_mem_efficient_sdp(before[1])
        cuda.enable_cudnn_sdp(before[2])
        if before[3] is None:
            del os.environ[WORKSPACE]
