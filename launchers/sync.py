"""Send W&B runs that were kept offline to the server; a second call sends only new ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mrpo_lab.errors import UserError
from mrpo_lab.runs.tracking import wandb_mode
from mrpo_lab.wording import format_count


def sync(outputs: Path, parallel: int) -> int:
    """Send the runs below ``outputs`` that W&B has not marked as sent, ``parallel`` at once.

    Returns:
        The exit code of ``wandb sync``.

    Raises:
        UserError: there is no API key or no server; W&B itself would retry for hours.
    """
    found = sorted({file.parent for file in outputs.glob("**/wandb/offline-run-*/*.wandb")})
    unsent = [folder for folder in found if not list(folder.glob("*.wandb.synced"))]
    already = format_count(len(found) - len(unsent), "run")
    if not unsent:
        print(f"W&B: nothing to send, {already} sent before")
        return 0
    os.environ.pop("WANDB_MODE", None)  # it kept the runs offline; now they are to be sent
    mode, reason = wandb_mode()
    if mode != "online":
        raise UserError(f"W&B: {format_count(len(unsent), 'run')} to send, but {reason}")
    print(f"W&B: sending {format_count(len(unsent), 'run')}, {already} sent before", flush=True)
    command = [sys.executable, "-m", "wandb", "sync", "-n", str(parallel), *map(str, unsent)]
    return subprocess.run(command, check=False).returncode
