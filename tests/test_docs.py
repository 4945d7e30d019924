"""Every command and every piece of code in README and docs is run, or composed where it needs the
hub."""

import re
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from harness import TINY, Opened, compose, train_py
from omegaconf import DictConfig, OmegaConf
from report_runs import make_run

from launchers.__main__ import parser
from mrpo_lab import configs
from mrpo_lab.command import named_seed
from mrpo_lab.data.dataset import Dataset
from mrpo_lab.data.reading import read_rows
from mrpo_lab.merging import __main__ as merging
from mrpo_lab.objective import losses
from mrpo_lab.objective.scores import Scores, chosen_first
from mrpo_lab.objective.weighting import Context
from mrpo_lab.objective.weighting.offline import Offline
from mrpo_lab.report import __main__ as report
from mrpo_lab.report import wandb_runs
from mrpo_lab.storage import __main__ as storage

ROOT = Path(__file__).parent.parent
ROOT_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*ROOT_PAGES, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [block for page in PAGES for block in pattern.findall(page.read_text())]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    inline = re.findall(
        r"`(python (?:train\.py|-m launchers) [^`]+)`", "".join(p.read_text() for p in PAGES)
    )
    shown = [line for line in inline if "GROUP=OPTION" not in line and "--help" not in line]
    return [shlex.split(line, comments=True) for line in [*lines, *shown]]


TRAINING = sorted({tuple(c[c.index("train.py") + 1 :]) for c in commands() if "train.py" in c})


def test_the_pages_have_commands() -> None:
    assert len(TRAINING) >= 8


@pytest.fixture
def my_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of docs/extending.md, beside where the user runs."""
    (content,) = (block for block in blocks("python") if "def arithmetic" in block)
    (tmp_path / "my_losses.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    monkeypatch.setenv("MRPO_LAB_TARGETS", "my_losses")


@pytest.mark.usefixtures("my_losses")
def test_a_loss_of_ones_own_trains_without_touching_the_package(
    tmp_path: Path, tiny7_dir: Path
) -> None:
    (command,) = (c for c in TRAINING if any("my_losses" in argument for argument in c))
    outcome = train_py(*TINY, *command[1:], f"outputs={tmp_path}/out")
    assert outcome.code == 0, outcome.err
    assert len(list(tmp_path.rglob("result.json"))) == 1


@pytest.mark.usefixtures("my_losses")
@pytest.mark.parametrize("arguments", TRAINING, ids=" ".join)
def test_training_command_composes_and_fits_its_signatures(arguments: tuple[str, ...]) -> None:
    overrides = [named_seed(argument) for argument in arguments]
    if arguments[0] == "-m":
        ours = [override for override in overrides[1:] if not override.startswith("hydra")]
        profile = [override for override in overrides[1:] if override.startswith("hydra")]
        chosen = [override for override in ours if override.startswith(("experiment=", "sweep="))]
        opened = Opened(*profile, *chosen)
        if profile:
            opened.cluster()
        runs = opened.runs(*ours)
        assert len(runs) > 1
        overrides = runs[-1]
    configs.check(compose(*overrides))


REPORT = ["python", "-m", "mrpo_lab.report"]
REPORTS = [c[3:] for c in commands() if c[:3] == REPORT]


@pytest.mark.parametrize("arguments", REPORTS, ids=" ".join)
def test_report_command_runs(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with the runs and the table that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    for weighting in ("vaw", "tsw"):
        folder = make_run(tmp_path / "made", "synthetic", weighting=weighting)
        copy = tmp_path / "outputs" / "quickstart" / "synthetic" / "tiny" / folder.parts[-2] / "s0"
        copy.mkdir(parents=True)
        for file in folder.iterdir():
            file.rename(copy / file.name)
    Path("theirs.csv").write_text("method,dataset,base,seed,final_test_acc\nvaw,d,mdpo,0,0.6\n")
    monkeypatch.setattr(wandb_runs, "read_project", lambda path: [])
    monkeypatch.setattr(time, "sleep", mock.Mock(side_effect=KeyboardInterrupt))
    rounds, nothing = 130 if "--watch" in arguments else 0, "--from-wandb" in arguments
    assert report.main(arguments) == (2 if nothing else rounds)
    assert nothing or "compare" in arguments or Path("report/index.html").exists()


def test_the_pages_have_report_commands() -> None:
    assert len(REPORTS) >= 6


OTHERS = [c for c in commands() if "train.py" not in c and c[:3] != REPORT]


@pytest.mark.parametrize("command", OTHERS, ids=" ".join)
def test_other_command_names_what_exists(command: list[str]) -> None:
    if command[:3] == ["python", "-m", "launchers"]:
        parser().parse_args(command[3:])
        return
    if command[:3] == ["python", "-m", "mrpo_lab.merging"]:
        merging.parser().parse_args(command[3:])
        return
    if command[:3] == ["python", "-m", "mrpo_lab.storage"]:
        storage.parser().parse_args(command[3:])
        return
    assert command[0] == "make", command
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert command[1] in targets


def test_files_that_the_pages_link_or_list_exist() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page}: {link}"


PLACES = "mrpo_lab|conf|launchers|hydra_plugins|tests|benchmarks|docs"
CODE = re.compile(rf"`((?:{PLACES})/[\w./-]*|[\w/]+/\w+\.py)`")


EXAMPLES = ("conf/loss/arithmetic.yaml", "conf/weighting/sharpest.yaml")
"""Files that docs/extending.md tells to write."""


def test_paths_in_the_text_exist() -> None:
    """Paths from the repository's root or, as docs/design.md has them, from ``mrpo_lab/``."""
    found = [(page, path) for page in PAGES for path in CODE.findall(page.read_text())]
    assert len(found) >= 20
    for page, path in found:
        absent = not (ROOT / path).exists() and not (ROOT / "mrpo_lab" / path).exists()
        assert not absent or path.startswith(EXAMPLES), f"{page}: {path}"


def tree(text: str) -> list[str]:
    """The paths of an indented tree, folders with a slash at their end."""
    found: list[str] = []
    above: list[str] = []
    for line in text.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        above[len(indent) // 2 :] = [name]
        found.append("".join(above))
    return found


def test_the_layout_names_every_folder_and_nothing_else() -> None:
    (layout,) = re.findall(r"^```\n(train\.py.*?)^```", PAGES[0].read_text(), re.M | re.S)
    named = tree(layout)
    assert [path for path in named if not (ROOT / path).exists()] == []
    packages = {
        f"{path.parent.relative_to(ROOT)}/"
        for top in ("mrpo_lab", "launchers", "hydra_plugins", "tests", "benchmarks")
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".jinja", ".html") and "fixtures" not in path.parts
    }
    assert packages <= set(named)


def test_profile_of_a_cluster_of_ones_own_is_what_its_keys_may_be() -> None:
    (block,) = blocks("yaml")
    own = OmegaConf.create(block)
    assert isinstance(own, DictConfig)
    assert own.pop("defaults") == ["slurm", "_self_"]
    opened = Opened("hydra/launcher=slurm")
    launcher = opened.master.hydra.launcher
    OmegaConf.set_struct(launcher, True)
    opened.master.hydra.launcher = OmegaConf.merge(launcher, own)
    opened.cluster()


class TestExtending:
    """The examples of docs/extending.md do what the page says."""

    names: dict[str, object]

    @pytest.fixture(autouse=True)
    def defined(self) -> None:
        from dataclasses import dataclass

        self.names = {
            "torch": torch,
            "Offline": Offline,
            "Dataset": Dataset,
            "dataclass": dataclass,
            "read_rows": read_rows,
        }
        for block in blocks("python"):
            exec(block, self.names)  # noqa: S102

    def test_loss(self) -> None:
        policy, refs = torch.randn(5, 2).double(), torch.randn(5, 3, 2).double()
        alpha = torch.nn.functional.one_hot(torch.full((5,), 1), 3).double()
        first = torch.tensor([1.0, 0.0]).double().expand(5, 2)
        link = partial(losses.logistic, target=first)
        ours, _ = self.names["arithmetic"](policy, refs, alpha, beta=0.7, link=link)  # type: ignore[operator]
        theirs, _ = losses.dpo(policy, refs, alpha, beta=0.7, link=link)
        torch.testing.assert_close(ours, theirs)

    def test_weighting(self) -> None:
        sums = torch.tensor([[[-1.0, -2.0], [-1.0, -4.0]], [[-2.0, -1.0], [-9.0, -4.0]]]).double()
        val = Scores(sums, torch.ones_like(sums, dtype=torch.int64))
        context = Context(
            ["a", "b"], val, chosen_first(2), lambda *subsets: [0.0], np.random.default_rng(0)
        )
        weighting = self.names["Sharpest"]()  # type: ignore[operator]
        weighting.start(context)
        assert weighting.proportions(val, chosen_first(2)).tolist() == [[0.0, 1.0]]

    def test_dataset(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text('{"question": "q", "good": "yes", "bad": "no"}\n')
        dataset = self.names["MyDataset"](path=str(file), train=None, val=0.1, test=0.1)  # type: ignore[operator]
        (item,) = dataset.read()
        assert item.replies == ("yes", "no")
