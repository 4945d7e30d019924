"""Python in the tests' jobs: runs the given module, but disturbs runs as planted files say.

A file in ``PLANTS`` is called ``SEED.STEP.WHAT``: ``raise`` or ``kill`` when that step is logged,
once. ``SEED.slow`` holds seconds to sleep at every step, as long as it is there.
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrpo_lab.runs.folder import Run

plants = Path(os.environ["PLANTS"])
log = Run.log


def meet(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    seed = run.folder.name.partition("__")[0]
    slow = plants / f"{seed}.slow"
    if slow.exists():
        time.sleep(float(slow.read_text()))
    for plant in plants.glob(f"{seed}.{step}.*"):
        plant.unlink()
        if plant.suffix == ".kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("planted")
    log(run, step, metrics)


patched: Any = Run
patched.log = meet
module = sys.argv.index("-m")
sys.argv = sys.argv[module + 1 :]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
