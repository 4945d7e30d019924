"""Offline W&B runs to the server; a second call sends only what is new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launchers.wording import counted
from mrpo_lab.errors import UserError
from mrpo_lab.runs.tracking import wandb_mode


def sync(outputs: Path, parallel: int) -> int:
    """Send what W&B has not marked as sent, many at once; the exit code of ``wandb sync``.

    Raises:
        UserError: there is no key or no server; W&B itself would try for hours.
    """
    there = sorted({file.parent for file in outputs.glob("**/wandb/offline-run-*/*.wandb")})
    unsent = [folder for folder in there if not list(folder.glob("*.wandb.synced"))]
    already = counted(len(there) - len(unsent), "run")
    if not unsent:
        print(f"W&B: nothing to send, {already} sent before")
        return 0
    os.environ.pop("WANDB_MODE", None)  # what keeps runs offline must not keep them here
    mode, reason = wandb_mode()
    if mode != "online":
        raise UserError(f"W&B: {counted(len(unsent), 'run')} to send, but {reason}")
    print(f"W&B: sending {counted(len(unsent), 'run')}, {already} sent before", flush=True)
    command = [sys.executable, "-m", "wandb", "sync", "-n", str(parallel), *map(str, unsent)]
    return subprocess.run(command, check=False).returncode
