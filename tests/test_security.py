"""A configuration cannot run, read or write anything of its own; secrets are not stored."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from harness import CONF, TINY, Opened, compose, train_py
from hydra.errors import HydraException
from hydra.types import RunMode

import mrpo_lab
from mrpo_lab import configs, targets
from mrpo_lab.composition import open_hydra, without_hydra
from mrpo_lab.console import UNPRINTABLE
from mrpo_lab.errors import UserError
from mrpo_lab.redaction import redact
from mrpo_lab.report.reading import make_record
from mrpo_lab.runs.provenance import provenance

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

RUN = "{_target_: os.system, command: 'touch pwned'}"
TARGETS = (
    "os.system",
    "builtins.eval",
    "functools.partial",
    "mrpo_lab.storage.files.os.system",
    "mrpo_lab.runs.tracking.shutil.copy",
    "mrpo_lab.models.weights.torch.load",
    "mrpo_lab.open_run",
    "mrpo_lab.cli.fail",
    "mrpo_lab.__class__",
    "mrpo_lab",
    "torch.optim.optimizer.torch.load",
    "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LambdaLR",
    "torch.load",
    "bitsandbytes.optim.GlobalOptimManager",
    "hydra.utils.instantiate",
    "",
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("key", ["weighting", "loss.link", "optimizer", "loss.combine"])
def test_target_outside_of_the_exact_set_is_refused(target: str, key: str) -> None:
    cfg = compose(*TINY)
    cfg_key, _, last = key.rpartition(".")
    (cfg[cfg_key][last] if cfg_key else cfg[last])["_target_"] = target
    with pytest.raises(UserError, match=rf"(^|; ){key}"):
        configs.check(cfg)
    with pytest.raises(UserError):
        targets.find(target)


def test_targets_of_the_project_are_those_that_its_configurations_use() -> None:
    """A new public name is either used by a file in conf/ or listed as no target."""
    used = {
        name
        for file in CONF.rglob("*.yaml")
        for name in mrpo_lab.__all__
        if f"mrpo_lab.{name}" in file.read_text().replace(",", "\n").replace("}", "\n").split()
    }
    assert used | targets.NO_TARGETS == set(mrpo_lab.__all__)
    assert not used & targets.NO_TARGETS
    for name in used:
        assert targets.find(f"mrpo_lab.{name}") is getattr(mrpo_lab, name)
    assert targets.find("torch.optim.AdamW") is torch.optim.AdamW


HYDRA: dict[str, list[str]] = {
    "hydra.callbacks": [f"+hydra.callbacks.x={RUN.replace('touch pwned', 'id')}"],
    "hydra.job_logging.handlers.console.class": [
        "hydra.job_logging.handlers.console.class=logging.FileHandler"
    ],
    "hydra.job_logging.handlers.x.filename": ["+hydra.job_logging.handlers.x={filename: pwned}"],
    "hydra.job_logging.handlers.x.factory": ["+hydra.job_logging.handlers.x={factory: os.system}"],
    "hydra.hydra_logging.formatters.x.class": ["+hydra.hydra_logging.formatters.x={class: a.B}"],
    "hydra.job_logging.formatters.simple.format": [
        "hydra.job_logging.formatters.simple.format='ext://os.system'"
    ],
    "hydra.job_logging.root.level": ["hydra.job_logging.root.level='ext://os.system'"],
    "hydra.job_logging.handlers.file.class": ["hydra/job_logging=default"],
    "hydra.hydra_logging: expected keys": ["hydra.hydra_logging=${x}", "+x={version: 1}"],
    "hydra.sweeper._target_": ["hydra.sweeper._target_=os.system"],
    "hydra.launcher._target_": ["hydra.launcher._target_=os.system"],
    "hydra.launcher.x._target_": [f"+hydra.launcher.x={RUN}"],
    "hydra.launcher.x._args_": ["+hydra.launcher.x={y: 1, _args_: [1]}"],
    "hydra.sweeper.grids: expected a value": ["hydra.sweeper.grids=${x}", f"+x={RUN}"],
    "hydra.launcher: expected keys": ["hydra.launcher=${x}", f"+x={RUN}"],
    "hydra.output_subdir": ["hydra.output_subdir=pwned"],
    "hydra.run.dir": ["hydra.run.dir=pwned"],
    "hydra.sweep.dir": ["hydra.sweep.dir=pwned"],
    "hydra.sweep.subdir": ["hydra.sweep.subdir=${name}"],
    "hydra.searchpath": ["hydra.searchpath=[pkg://os]"],
    "hydra.searchpath: configuration": ["++hydra.searchpath=[file:///tmp]"],
    "hydra.job.env_set": ["+hydra.job.env_set.PATH=pwned"],
    "hydra.job.env_copy": ["hydra.job.env_copy=[PATH]"],
    "hydra.job.chdir": ["hydra.job.chdir=true"],
    "the configuration cannot be composed: ": ["hydra.job.env_copy=[NO_SUCH_VARIABLE]"],
    "hydra.verbose.0": ["hydra.verbose=[3]"],
    "hydra.env": ["++hydra.env={x: 1}"],
}


@pytest.mark.parametrize(("said", "overrides"), HYDRA.items(), ids=HYDRA.keys())
def test_hydra_is_given_nothing_to_run_read_or_write(said: str, overrides: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        Opened(*TINY, *overrides)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "arguments",
    [[], ["-m"], ["--cfg", "job"], ["--cfg", "hydra"], ["--info", "config"], ["--help"]],
    ids=" ".join,
)
def test_every_mode_refuses_before_hydra_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = train_py(*arguments, *TINY, "seed=0", f"+hydra.callbacks.x={RUN}")
    assert (outcome.code, outcome.error[:23]) == (2, "error: hydra.callbacks:")
    assert list(tmp_path.iterdir()) == []


def test_what_the_project_documents_is_allowed() -> None:
    for overrides in (
        ["hydra/launcher=slurm", "hydra.launcher.setup=['module load cuda']"],
        ["hydra/launcher=local", "hydra.verbose=true"],
        ["hydra/job_logging=none", "hydra/sweeper=basic"],
        ["sweep=quick", "hydra.job_logging.root.level=WARNING"],
    ):
        Opened(*TINY, *overrides)


STRANGERS = {
    "hydra: {launcher: {setup: [touch pwned]}}": "hydra.launcher.setup",
    "hydra: {launcher: {python: touch pwned}}": "hydra.launcher.python",
    "hydra: {job_logging: {version: 1}}": "hydra.job_logging.version",
    "hydra: {sweeper: {_target_: os.system}}": "hydra.sweeper._target_",
    "hydra: {searchpath: [pkg://os]}": "hydra.searchpath",
    "- name: list": "expected lines of key: value",
    "tracker: {group: '${oc.env:HOME}'}": "tracker.group: a configuration does not read",
    "model: {trust_remote_code: true}": "model.trust_remote_code: runs code",
    "weighting: {_target_: os.system}": "weighting: _target_ os.system",
}


@pytest.mark.parametrize(("content", "said"), STRANGERS.items(), ids=STRANGERS.keys())
def test_experiment_of_a_stranger(tmp_path: Path, content: str, said: str) -> None:
    assert said in with_experiment(tmp_path, f"# @package _global_\n{content}\n")


def test_experiment_of_a_stranger_that_claims_to_be_about_hydra(tmp_path: Path) -> None:
    content = "# @package hydra\nlauncher: {setup: [touch pwned]}\n"
    assert "hydra.launcher.setup" in with_experiment(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("loss:\n\tbeta: 1\n", "theirs.yaml line 2: not valid YAML: found character"),
        ("a: b: c\n", "theirs.yaml line 1: not valid YAML: mapping values"),
        ("", "experiment: its file sets nothing: it begins with the line '# @package _global_'"),
        ("- a\n", "experiment: its file sets nothing"),
        ("# @package _global_\ndefaults:\n  - override /loss: nope\n", "loss/nope"),
    ],
)
def test_experiment_file_that_cannot_be_used(tmp_path: Path, content: str, said: str) -> None:
    assert said in with_experiment(tmp_path, content)


def with_experiment(folder: Path, content: str) -> str:
    """Why a run with this experiment is refused."""
    (folder / "experiment").mkdir()
    (folder / "experiment" / "theirs.yaml").write_text(content)
    chosen = ["experiment=theirs", "reference_set=tiny7", "dataset=synthetic"]
    hydra = open_hydra(CONF, folder)
    with pytest.raises((UserError, HydraException)) as refused:
        configs.check(without_hydra(hydra.compose_config("config", chosen, RunMode.RUN)))
    return str(refused.value)


def test_variables_of_the_environment_are_not_read() -> None:
    for text in ("${oc.env:HOME}", "${oc.env:HOME,x}", "${oc.${x}:HOME}", "${oc.decode:'${y}'}"):
        cfg = compose(*TINY, "+x=env", "+y=${oc.env:HOME}", f'name="{text}"')
        with pytest.raises(UserError, match="does not read environment variables, as HOME") as said:
            configs.check(cfg)
        assert os.environ["HOME"] not in str(said.value)


SECRETS = [
    "hf_abcdefghijklmnopqrstuvwx",
    "sk-proj-abcdefghijklmnopqrst",
    "ghp_abcdefghijklmnopqrstuvwx",
    "0123456789abcdef0123456789abcdef01234567",
    "https://me:hunter22@example.org/data.jsonl",
    "password=hunter22",
    "token: hunter22",
    "WANDB_API_KEY=hunter22",
]
NO_SECRETS = [
    "revision=0123456789abcdef0123456789abcdef01234567",
    "/hub/snapshots/0123456789abcdef0123456789abcdef01234567/model",
    "train.token_budget=4096",
    "weighting.unit=token",
    "HF_TOKEN=$(cat token)",
    "https://example.org/a@b",
    "disk-full-of-many-many-words",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret_is_neither_stored_nor_printed(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="looks like a key or a password") as refused:
        Opened(*TINY, "tracker=wandb", f'tracker.group="{secret}"')
    assert "hunter22" not in str(refused.value)
    monkeypatch.setattr("sys.argv", ["train.py", f"tracker.group={secret}"])
    (_, command) = provenance()["command"]
    assert "[redacted]" in command
    assert secret not in command


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_is_kept(text: str) -> None:
    assert redact(text) == text


def test_a_commit_is_no_secret() -> None:
    compose(*TINY, f"model.revision='{'0123456789' * 4}'")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a module beside where the user runs, and allows it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(content: str, name: str = "my_weightings") -> None:
        (tmp_path / f"{name}.py").write_text(content)
        monkeypatch.setenv(targets.VARIABLE, f"{name}, ")
        monkeypatch.delitem(sys.modules, name, raising=False)

    return make


MINE = "from os import system\nfrom mrpo_lab import VAW\n\nclass Mine(VAW): ...\n"


def test_own_modules_are_allowed_by_the_environment_alone(own: Callable[..., None]) -> None:
    own(MINE)
    cfg = compose(*TINY, "weighting._target_=my_weightings.Mine")
    configs.check(cfg)
    assert type(configs.build(cfg, "weighting")).__name__ == "Mine"
    for target in ("my_weightings.system", "my_weightings.VAW", "my_weightings.os.system"):
        with pytest.raises(UserError, match="_target_ my_weightings"):
            targets.find(target)
    del os.environ[targets.VARIABLE]
    with pytest.raises(UserError, match="the environment variable MRPO_LAB_TARGETS lists"):
        configs.check(cfg)


def test_own_module_that_cannot_be_imported_is_named(own: Callable[..., None]) -> None:
    own("import nothing_of_that_name", "broken")
    with pytest.raises(UserError, match="MRPO_LAB_TARGETS: broken cannot be imported: No module"):
        targets.find("broken.x")
    os.environ[targets.VARIABLE] = "a/b"
    with pytest.raises(UserError, match="MRPO_LAB_TARGETS: 'a/b' is no name of a module"):
        targets.find("a.x")


def test_remote_code_needs_consent_outside_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = "reference_set.entries=[{slug: a, path: a/b, trust_remote_code: true}]"
    cfg = compose("experiment=quickstart", "reference_set.anchor=null", entry)
    with pytest.raises(UserError, match=r"entries\.0\.trust_remote_code: runs code"):
        configs.check(cfg)
    monkeypatch.setenv(configs.TRUST, "1")
    configs.check(cfg)


def test_report_of_strange_runs_has_printable_texts_only() -> None:
    """The program that draws its figures stops at a control character."""
    strange = "a\x1b[31m"
    frame = pd.DataFrame({strange: [strange], "step": [1.0]})
    tree = {strange: [strange, 1, None, {"x": strange}]}
    record = make_record(
        strange, strange, tree, {**tree, "error": strange}, [tree], frame, frame, None, 0.0
    )
    assert not UNPRINTABLE.search(repr(record).replace("\n", ""))
    assert "\x1b" not in "".join(record.metrics.columns) + record.metrics.iloc[0, 0]
    assert record.metrics["step"].tolist() == [1.0]
    assert list(record.config) == [r"a\x1b[31m"]
