"""Many runs in one process, as in a notebook: nothing of a run is left when it has ended."""

from pathlib import Path

import pytest
from harness import said_by

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

RUNS = 12
WARM_UP = 8

SCRIPT = """
import gc, json, logging, os, sys, threading
from pathlib import Path

sys.path.insert(0, "tests")
import torch
from harness import compose, killed, TINY
from mrpo_lab.errors import UserError
from mrpo_lab.experiment import run_experiment
from mrpo_lab.runs.folder import Run
from mrpo_lab.training.trainer import Trainer

outputs, runs = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(2)
random_state = torch.random.get_rng_state()
LORA = "model.lora={r: 4, target_modules: [q_proj, down_proj]}"

def interrupt(*args):
    raise KeyboardInterrupt

def one(number):
    cfg = compose(*TINY, f"outputs={outputs / str(number)}", *([LORA] if number % 2 else []))
    batch = Trainer.batch
    if number % 4 == 2:  # a run that fails, and one that is interrupted
        Trainer.batch = lambda *_: 1 / 0
    elif number % 4 == 3:
        Trainer.batch = interrupt
    try:
        run_experiment(cfg, "run")
    except (ZeroDivisionError, KeyboardInterrupt) as error:
        pass
    finally:
        Trainer.batch = batch

def left():
    # Without a collection: no cycle may keep a model or a file.
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return {
        "tensors": len(tensors),
        "files": len(os.listdir("/proc/self/fd")),
        "python threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),
        "children": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        "handlers": len(logging.getLogger().handlers),
        "torch threads": torch.get_num_threads(),
        "random state": bool(torch.equal(torch.random.get_rng_state(), random_state)),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "drafts": len(list(outputs.rglob("*.tmp"))),
    }

def resident():
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

gc.disable()
found = []
for number in range(runs):
    one(number)
    found.append({**left(), "KiB": resident()})
print(json.dumps(found))
"""


def test_nothing_of_a_run_is_left(tmp_path: Path) -> None:
    found = said_by(SCRIPT, str(tmp_path), str(RUNS), TMPDIR=str(tmp_path))
    kibibytes = [each.pop("KiB") for each in found]
    warm = found[WARM_UP - 1]
    assert warm["tensors"] < 10  # the script's own, and constants of libraries
    assert warm["torch threads"] == 2
    assert warm["random state"]
    assert found[WARM_UP:] == [warm] * (RUNS - WARM_UP)
    assert max(kibibytes[WARM_UP:]) < 1.02 * kibibytes[WARM_UP - 1]
    assert {path.name for path in tmp_path.iterdir()} == {str(n) for n in range(RUNS)}
