"""A stranger's configuration: it runs, reads and writes nothing; no secret gets out."""

from __future__ import annotations

import os
import sys
from functools import partial
from inspect import isfunction, ismodule
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import yaml
from harness import TINY

import mrpo_lab
from torture.kinds.overrides import limited_and_before_loading
from torture.place import ESCAPE, Place, refused, succeeded
from torture.process import BrokenError, Finished

SECRET = "hunter2-" + "k3" * 12
NODES = (
    *("loss", "loss.combine", "loss.link", "loss.clip", "weighting", "optimizer", "tracker"),
    *("dataset", "model", "seed", "train", "lambda", "+evil", "+train.x", "+loss.x"),
)
TARGETS = (
    *("os.system", "builtins.eval", "builtins.exec", "builtins.open", "subprocess.run"),
    *("shutil.rmtree", "runpy.run_path", "pathlib.Path.write_text", "hydra.utils.call"),
    *("hydra.utils.instantiate", "hydra._internal.utils._locate", "torch.load", "numpy.load"),
    *("pickle.load", "mrpo_lab.storage.tables.np.load", "mrpo_lab.runs.tracking.shutil.copy"),
    *("torch.optim.optimizer.torch.load", "torch.optim.adam.torch.load", "canary_module.run"),
    *("mrpo_lab.runs.folder.shutil.rmtree", "mrpo_lab.storage.files.write_whole"),
    *("mrpo_lab.training.state_file.save_state", "torch.optim.lr_scheduler.warnings.sys.exit"),
    *(
        "mrpo_lab.os.system",
        "mrpo_lab..os.system",
        "mrpo_lab.",
        "torch.optim.",
        "mrpo_lab.__init__",
    ),
    *(
        "mrpo_lab.open_run.__globals__",
        "mrpo_lab.VAW.__subclasses__",
        "bitsandbytes.optim.torch.load",
    ),
)


def trial(place: Place, random: Random) -> None:
    canary = place.folder / "canary"
    canary.write_text(SECRET)
    (place.work / "canary_module.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    place.take_scores()
    attack = random.choice([target_in_override, target_in_file, hydra_in_file, secret, escape])
    words, harmless = attack(place, random, str(canary))
    done = place.start(
        *("train.py", *words), before=partial(watched, canary), HOSTILE_SECRET=SECRET
    ).wait()
    untouched(place, canary, done)
    if (place.folder / "escaped").exists():
        raise BrokenError(f"a folder was made outside of outputs: {done}")
    if done.code == 0 and harmless:
        succeeded(done)
    else:
        refused(done)


def untouched(place: Place, canary: Path, done: Finished) -> None:
    """Nothing was done that the attack wanted.

    Raises:
        BrokenError: says what was.
    """
    touched = place.folder / "touched"
    if touched.exists():
        raise BrokenError(f"{touched.read_text()}: {done}")
    if not canary.exists() or canary.read_text() != SECRET:
        raise BrokenError(f"the canary was changed: {done}")
    if ESCAPE in done.out + done.err:
        raise BrokenError(f"an escape sequence reached the terminal: {done!r}")
    if SECRET in done.out + done.err:
        raise BrokenError("a secret of the environment was printed")
    for path in place.work.rglob("*"):
        if SECRET in str(path) or (path.is_file() and SECRET.encode() in path.read_bytes()):
            raise BrokenError(f"a secret of the environment is in {path}")


def watched(canary: Path) -> None:
    """Note whatever touches the canary, even if only to look at it, and stop before loading."""
    limited_and_before_loading()
    report = str(canary.with_name("touched"))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        first = str(arguments[0]) if arguments else ""
        opened = event.startswith(("open", "os.", "shutil.", "pathlib.")) and first == str(canary)
        ran = event in ("os.system", "os.exec", "subprocess.Popen") and str(canary) in repr(
            arguments
        )
        if opened or ran or (event == "import" and first == "canary_module"):
            file = os.open(report, os.O_WRONLY | os.O_CREAT)
            os.write(file, f"{event} {first}".encode())
            os.close(file)

    sys.addaudithook(audit)


Attack = tuple[list[str], bool]
"""Words of the command line, and whether the command may go on."""


def target_in_override(place: Place, random: Random, canary: str) -> Attack:
    node, target = random.choice(NODES), random_target(random)
    place.notes.append(target)
    values = f'{{_target_: "{target}", _args_: ["{random.choice(arguments(canary))}"]}}'
    if random.random() < 0.3 and node[0] != "+":
        return [*TINY, f"{node}._target_={target}"], False
    return [*TINY, f"{'' if node[0] == '+' else '++'}{node}={values}"], False


def target_in_file(place: Place, random: Random, canary: str) -> Attack:
    node, target = random.choice(NODES).lstrip("+"), random_target(random)
    values: Any = {"_target_": target, "_args_": [random.choice(arguments(canary))]}
    if random.random() < 0.3:
        values = {"_target_": "mrpo_lab.PreferenceLoss", "combine": values}
    if random.random() < 0.3:
        values["_recursive_"] = random.random() < 0.5
    for part in reversed(node.split(".")):
        values = {part: values}
    return stranger(place, values), False


def hydra_in_file(place: Place, random: Random, canary: str) -> Attack:
    call = {"_target_": random_target(random), "_args_": [random.choice(arguments(canary))]}
    file = {"class": "logging.FileHandler", "filename": canary, "mode": "w"}
    factory = {"()": random.choice(TARGETS[:9]), "command": f"touch {canary}"}
    place_of = str(place.folder / "escaped")
    nodes: list[dict[str, Any]] = [
        {"callbacks": {"evil": call}},
        {"launcher": call, "mode": "MULTIRUN"},
        {"sweeper": call, "mode": "MULTIRUN"},
        {"job_logging": {"handlers": {"evil": file}, "root": {"handlers": ["evil"]}}},
        {"job_logging": {"handlers": {"evil": factory}, "root": {"handlers": ["evil"]}}},
        {"hydra_logging": {"handlers": {"evil": file}, "root": {"handlers": ["evil"]}}},
        {"job_logging": {"filters": {"evil": factory}}},
        {"run": {"dir": place_of}},
        {"sweep": {"dir": place_of}, "mode": "MULTIRUN"},
        {"output_subdir": place_of},
        {"job": {"env_set": {"LD_PRELOAD": canary}}},
        {"job": {"chdir": True}, "run": {"dir": place_of}},
        {"searchpath": [f"file://{place.folder}"]},
    ]
    node = random.choice(nodes)
    place.notes.append(str(node))
    words = stranger(place, {"hydra": node})
    return words, False


def secret(place: Place, random: Random, canary: str) -> Attack:
    """The configuration asks for a variable of the environment."""
    key = random.choice(["name", "+tracker.tags.0", "+note", "seed.name"])
    value = random.choice(["${oc.env:HOSTILE_SECRET}", "x${oc.env:HOSTILE_SECRET,1}"])
    return [*TINY, f"{key}='{value}'"], True


def escape(place: Place, random: Random, canary: str) -> Attack:
    """Terminal escapes in names and texts."""
    bad = random.choice(["\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "a\rb", "\u202eabc"])
    entry = f'{{slug: "{bad}", path: "embedded:tiny7/tiny-llama"}}'
    choices = [
        [f'name="{bad}"'],
        [f'loss="{bad}"'],
        [f'{bad}="1"'],
        [f'+train.x="{bad}"'],
        [f'model.path="{bad}"'],
        [f'outputs="{bad}"'],
        ["reference_set=custom", "reference_set.use=null", f"reference_set.entries=[{entry}]"],
        ["dataset=jsonl", f'dataset.path="{bad}"'],
    ]
    return [*TINY, *random.choice(choices)], True


def stranger(place: Place, content: dict[str, Any]) -> list[str]:
    """Write a stranger's experiment file, and give the words that use it."""
    folder = place.work / "theirs" / "experiment"
    folder.mkdir(parents=True)
    text = "# @package _global_\ndefaults: [quickstart]\n" + yaml.safe_dump(content)
    (folder / "theirs.yaml").write_text(text)
    return [f"--config-dir={place.work / 'theirs'}", *TINY[1:], "experiment=theirs"]


def arguments(canary: str) -> list[str]:
    return [f"touch {canary}; rm {canary}", canary, f"open('{canary}').read()"]


def random_target(random: Random) -> str:
    """A callable that does harm, or any that an attribute of a public module leads to."""
    if random.random() < 0.5:
        return random.choice(TARGETS)
    modules = [name for name in sys.modules if name.startswith(("mrpo_lab.", "torch.optim"))]
    name = random.choice(sorted(modules))
    module, path = sys.modules[name], name
    for _ in range(2):
        inner = sorted(k for k, v in vars(module).items() if ismodule(v))
        if not inner or random.random() < 0.3:
            break
        key = random.choice(inner)
        module, path = vars(module)[key], f"{path}.{key}"
    return f"{path}.{random.choice(_functions(module) or ['nothing'])}"


def _functions(module: ModuleType) -> list[str]:
    """Names of a module's functions that a configuration has no business with."""
    public = set(mrpo_lab.__all__)
    return sorted(k for k, v in vars(module).items() if isfunction(v) and k not in public)
