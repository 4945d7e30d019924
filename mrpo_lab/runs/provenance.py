"""Code, libraries and hardware of a run: enough to say later what produced a number."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mrpo_lab.redaction import redact

VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "hydra-core")


def provenance() -> dict[str, Any]:
    """Describe the code, libraries and hardware of this process."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [redact(argument) for argument in sys.argv],
        "git": {
            "commit": _git("rev-parse", "HEAD"),
            "changed": bool(_git("status", "--porcelain")),
        },
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "host": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "job": cluster_job(),
    }


def cluster_job() -> dict[str, str] | None:
    """SLURM's id of this job, its node and how often it was restarted; None outside SLURM."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "id": f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"],
        "node": os.environ.get("SLURMD_NODENAME", ""),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
