"""A stand-in for torch's flash attention of variable lengths, which runs on GPUs only, and the
backend that uses it."""

import pytest
import torch
from torch import Tensor

from mrpo_lab.scoring import scorer, varlen
from mrpo_lab.scoring.backend import GPU


def attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """One sequence after the other by torch's plain attention, with the kernel's alignment.

    What the kernel does not survive is refused: sequences that are empty or do not cover the row.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    queries, keys = cu_seq_q.diff(), cu_seq_k.diff()
    assert bool((queries > 0).all())
    assert bool((keys >= queries).all())
    assert (int(queries.max()), int(keys.max())) == (max_q, max_k)
    left, right = window_size
    assert right == 0
    assert left == -1 or left >= 0
    attended = []
    for i in range(len(queries)):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1) for x in (key, value))
        last = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        back = last - torch.arange(k.shape[1])
        seen = (back >= 0) & ((back <= left) | (left < 0))
        attended.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], seen, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    return torch.cat(attended)


@pytest.fixture
def gpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scorers compute on this CPU what they would on a GPU, in all floating-point types."""
    monkeypatch.setattr(varlen, "flash_attention", attend_each)
    monkeypatch.setattr(varlen, "DTYPES", (*varlen.DTYPES, torch.float32, torch.float64))
    monkeypatch.setattr(scorer, "backend_for", lambda device, dtype: GPU)


@pytest.fixture(params=["cpu", "gpu"])
def each_backend(request: pytest.FixtureRequest) -> str:
    """Run a test on the CPU's backend and on the GPU's."""
    if request.param == "gpu":
        request.getfixturevalue("gpu_backend")
    return str(request.param)
