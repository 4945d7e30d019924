"""The command line: a wrong argument is answered in one line, and no files are left behind."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
from harness import SLUGS, TINY, read_json, train_py
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.errors import MissingConfigException
from transformers import AutoModelForCausalLM

from mrpo_lab.command import explain, named_seed
from mrpo_lab.storage import cache
from mrpo_lab.training.trainer import Trainer

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")

ROWS = [
    {"prompt": f"Shop {i}?", "chosen": f"Walk {i} steps.", "rejected": f"No {i}."}
    for i in range(20)
]


def refused(outputs: Path, *overrides: str) -> str:
    """The one line on stderr of a command that leaves no trace in ``outputs``."""
    outcome = train_py(f"outputs={outputs}", *overrides)
    assert outcome.code == 2, outcome
    assert outcome.error.startswith("error: ")
    assert not list(outputs.rglob("*")) if outputs.is_dir() else not outputs.exists()
    return outcome.error.removeprefix("error: ")


TYPOS: dict[str, tuple[list[str], str]] = {
    # option, key, grammar
    "option": (["loss=mdop"], "loss=mdop: no such option, did you mean mdpo? choose from dpo, geo"),
    "experiment": (["experiment=quikstart"], "did you mean quickstart?"),
    "nested option": (["loss/link=ippo"], "loss/link=ippo: no such option, did you mean ipo?"),
    "seed": (["seed=s_7"], "seed=s_7: no such option"),
    "key": (["loss.btea=1"], "loss.btea: no such key, did you mean beta? choose from beta, clip"),
    "group": (["weihgting=vaw"], "weihgting: no such key, did you mean weighting? choose from"),
    "added key": (
        ["+loss.btea=1"],
        "loss.btea: unknown; mrpo_lab.PreferenceLoss takes",
    ),
    "below a leaf": (["train.epochs.x=1"], "train.epochs.x: no such key"),
    "no value": (["loss.beta"], "loss.beta: cannot be read as key=value: "),
    "open bracket": (["loss=[mdpo"], "loss=[mdpo: cannot be read as key=value: "),
    "open quote": (["loss.beta='"], "loss.beta=': cannot be read as key=value: "),
    "list": (["seed=0,1"], "seed=s0,s1: several values; to run each of them, begin with -m"),
    "taken away": (["~loss"], "loss: nothing is chosen, give loss=OPTION"),
    "null option": (["loss=null"], "options of a group are names, as in loss=mdpo"),
    "number option": (["loss=0.5"], "options of a group are names, as in loss=mdpo"),
    "number of a seed": (
        ["seed=0.5"],
        "seed=0.5: a seed is a whole number, 0 or more, as in seed=42",
    ),
    "interpolation": (["train.epochs=${foo.bar}"], "train.epochs: Interpolation key 'foo.bar'"),
    # type
    "text for a number": (["loss.beta=abc"], "loss.beta: Input should be a valid number, got 'ab"),
    "null for a number": (["loss.beta=null"], "loss.beta: Input should be a valid number, got No"),
    "float for an integer": (["train.batch_size=1.5"], "train.batch_size: Input should be a valid"),
    "flag for an integer": (["train.epochs=true"], "train.epochs: Input should be a valid integer"),
    "number for a flag": (["loss.length_normalized=2"], "loss.length_normalized: Input should be"),
    "number for a node": (["loss.link=3"], "loss.link: expected a node with a _target_, got 3"),
    "text for a list": (["reference_set.use=a"], "reference_set.use: Input should be a valid arr"),
    "null for a name": (["name=null"], "name: expected text, got None"),
    "number for a folder": (["outputs=5"], "outputs: expected text, got 5"),
    # range
    "beta": (["loss.beta=-1"], "loss.beta must be greater than 0, got -1"),
    "nan": (["loss.beta=nan"], "loss.beta: expected a finite number, got nan"),
    "batch size": (["train.batch_size=0"], "train.batch_size must be at least 1, got 0"),
    "schedule": (["train.schedule=foo"], "train.schedule must be one of constant, linear, cosin"),
    "learning rate": (
        ["optimizer.lr=-1"],
        "optimizer.lr: Input should be greater than or equal to 0",
    ),
    "dtype": (
        ["model.dtype=float8"],
        "model.dtype must be one of float64, float32, bfloat16, float16",
    ),
    "share": (["dataset.val=1.5"], "dataset.val must be a number of pairs or a share, got 1.5"),
    "seed root": (["seed.root=-1"], "seed.root must be 0 or more, got -1"),
    # targets: nothing outside the project's own packages and optimizers is run
    "os.system": (["loss.link._target_=os.system"], "loss.link: _target_ os.system is outside of"),
    "eval": (["+train.x={_target_: builtins.eval}"], "train.x: _target_ builtins.eval is outside"),
    "in a list": (
        ["reference_set.entries=[{_target_: os.kill}]"],
        "reference_set.entries.0: _targ",
    ),
    "look-alike": (["loss._target_=mrpo_labs.x"], "loss: _target_ mrpo_labs.x is outside"),
    "absent": (
        ["loss.combine._target_=mrpo_lab.objective.losses.nope"],
        "loss.combine: _target_ mrpo_lab.objective.losses.nope is outside of",
    ),
    # values that do not fit one another
    "not given": (["weighting=fixed"], "weighting.weights: required, give weighting.weights=VALUE"),
    "negative": (
        ["weighting=fixed", "weighting.weights=[1,-1,1]"],
        "weighting.weights must be fi",
    ),
    "too few": (["weighting=fixed", "weighting.weights=[1,2]"], "weighting.weights has 2 numbers"),
    "unknown reference": (
        ["reference_set.use=[nope]"],
        "reference_set.use: no reference is called",
    ),
    "unknown slug": (
        ["weighting=single", "weighting.slug=bob"],
        "weighting.slug: no reference is",
    ),
    "unknown anchor": (["reference_set.anchor=bob"], "reference_set.anchor: no entry is called"),
    "large probe": (["weighting=tsw", "weighting.probe_size=9"], "weighting.probe_size is 9, but"),
    "untrainable": (
        ["model.quantization=nf4"],
        "model: quantized weights cannot be trained: set l",
    ),
    "lora key": (["model.lora={r: 2, foo: 1}"], "model.lora.foo: unknown"),
    "lora target": (
        ["model.lora={target_modules: [foo]}"],
        "model.lora: Target modules {'foo'} no",
    ),
    # models
    "no folder": (["model.path=/nope/model"], "there is no model folder /nope/model"),
    "no such embedded": (["model.path=embedded:tiny7/foo"], "embedded:tiny7/foo: there is no such"),
    "no such template": (
        ["model.template=nope"],
        "policy: template 'nope' is neither plain, chatm",
    ),
    # too little data
    "sizes": (["dataset.val=33"], "dataset: 40 eligible pairs are too few for train="),
    "pool": (["dataset.pool=41"], "dataset.pool is 41, but only 40 pairs are eligible"),
    "filters": (["dataset.max_tokens=3"], "dataset: no pairs left after filtering: rows 40, "),
}


@pytest.mark.parametrize(("overrides", "said"), TYPOS.values(), ids=TYPOS.keys())
def test_mistake_is_named_in_one_line(tmp_path: Path, overrides: list[str], said: str) -> None:
    assert said in refused(tmp_path / "outputs", *TINY, *overrides)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    line = refused(tmp_path, *TINY, "loss.beta=x", "train.epochs=1.5", "loss.clip._target_=a.b")
    for key in ("loss.beta: ", "train.epochs: ", "loss.clip: _target_ a.b"):
        assert key in line


def jsonl(path: Path, rows: Sequence[Any]) -> list[str]:
    """Overrides for a run on ``rows``; a string stands for a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    tiny = [override for override in TINY if not override.startswith("dataset.")]
    return [*tiny, "dataset=jsonl", f"dataset.path={path}"]


BAD_ROWS: dict[str, tuple[list[Any], str]] = {
    "columns": (
        [{"a": 1, "b": 2}],
        "{} line 1: no chosen and no rejected; columns are a, b; expect",
    ),
    "JSON": ([*ROWS[:4], "{nope", *ROWS], "{} line 5: not valid JSON: Expecting property name"),
    "scalar": ([*ROWS, "5"], "{} line 21: expected an object, got int"),
    "null": ([dict(ROWS[0], chosen=None)], "{} line 1: no chosen; columns are prompt, chosen, rej"),
    "number": ([dict(ROWS[0], chosen=3)], "{} line 1: chosen must be a string or a list of"),
    "nothing": ([], "no rows"),
    "identical": ([dict(ROWS[0], chosen="No 0.")] * 20, "no pairs left after filtering: rows 20, "),
    "few": (ROWS[:4], "4 eligible pairs are too few for"),
}


@pytest.mark.parametrize(("rows", "said"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_is_named_with_file_and_line(tmp_path: Path, rows: list[Any], said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    assert said.format(path) in refused(tmp_path / "outputs", *jsonl(path, rows))


def test_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    command = jsonl(tmp_path / "pairs.jsonl", ROWS)
    (tmp_path / "pairs.jsonl").unlink()
    line = refused(tmp_path / "outputs", *command)
    assert line == f"dataset.path: there is no file or folder {tmp_path / 'pairs.jsonl'}"
    assert "give dataset.path=VALUE" in refused(tmp_path / "outputs", *command[:-1])


@pytest.mark.parametrize("whose", ["policy", "other"])
def test_model_without_a_template_says_how_to_give_one(
    tmp_path: Path, tiny7_dir: Path, whose: str
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny7_dir / "tiny-llama", bare)
    (bare / "chat_template.jinja").unlink()
    entries = f"[{{slug: base, path: 'embedded:tiny7/tiny-qwen2'}}, {{slug: other, path: {bare}}}]"
    key = {"policy": f"model.path={bare}", "other": f"reference_set.entries={entries}"}[whose]
    command = [*TINY, "reference_set.anchor=null", "reference_set.use=null", key]
    line = refused(tmp_path / "outputs", *command)
    assert f"{whose}: {bare} has no chat template: give one, template=plain, " in line
    if whose == "policy":
        outcome = train_py(f"outputs={tmp_path / 'outputs'}", *command, "model.template=chatml")
        assert outcome.code == 0


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("embedded:tiny7/tiny-qwen2", "does not fit embedded:tiny7/tiny-qwen2: "),  # other shapes
        ("embedded:tiny7/tiny-neox", "does not fit embedded:tiny7/tiny-neox: Target modules"),
    ],
)
def test_adapter_of_another_model_is_refused(
    tmp_path: Path, tiny7_dir: Path, path: str, said: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny7_dir / "tiny-llama")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(base, lora).save_pretrained(str(tmp_path / "adapter"))
    entry = f"{{slug: tuned, path: '{path}', adapter: {tmp_path / 'adapter'}}}"
    custom = ["reference_set.anchor=null", "reference_set.use=null"]
    line = refused(tmp_path / "outputs", *TINY, *custom, f"reference_set.entries=[{entry}]")
    assert f"adapter {tmp_path / 'adapter'} {said}" in line


def test_unwritable_outputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for outputs in (tmp_path / "file" / "below", Path("/dev/null/x")):
        outcome = train_py(*TINY, f"outputs={outputs}")
        assert outcome.code == 2
        assert outcome.error.startswith(f"error: outputs: cannot write {outputs}/")
        assert outcome.error.endswith(": Not a directory")


def test_truncated_shard_of_scores_is_named_and_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny7_dir: Path
) -> None:
    (tmp_path / "models").symlink_to(tiny7_dir.parent)
    monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path))
    assert train_py(*TINY, f"outputs={tmp_path / 'first'}").code == 0
    shards = sorted((cache.root() / "scores").glob("*/*.safetensors"))
    assert len(shards) == len(SLUGS)
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-9])
    line = refused(tmp_path / "second", *TINY)
    assert line.startswith(f"{shards[0]}: damaged (")
    assert line.endswith("delete it, it will be computed again")
    shards[0].unlink()
    assert train_py(*TINY, f"outputs={tmp_path / 'second'}").code == 0
    first, second = (
        read_json(next((tmp_path / name).rglob("result.json"))) for name in ("first", "second")
    )
    assert first["references"] == second["references"]


def test_interrupted_command_says_how_to_go_on(tmp_path: Path) -> None:
    with mock.patch.object(Trainer, "train_step", side_effect=KeyboardInterrupt):
        outcome = train_py(*TINY, f"outputs={tmp_path}")
    assert outcome.code == 130
    last = outcome.err.splitlines()[-1]
    assert last == "error: interrupted: the same command goes on from the last checkpoint"


def test_sweep_runs_every_combination_and_goes_on_after_a_mistake(tmp_path: Path) -> None:
    one_step = ("protocol.batch_size=24", f"outputs={tmp_path}", "train.evaluations=1")
    outcome = train_py("-m", *TINY, *one_step, "seed=0,1", "loss.beta=-1,1")
    assert outcome.code == 2
    errors = [line for line in outcome.err.splitlines() if line.startswith("error")]
    assert errors == ["error: loss.beta must be greater than 0, got -1"] * 2
    done = [path.parent for path in sorted(tmp_path.rglob("result.json"))]
    assert [folder.name[:4] for folder in done] == ["s0__", "s1__"]
    configs = [(folder / "config.yaml").read_text() for folder in done]
    assert ["root: 0" in configs[0], "root: 1" in configs[1]] == [True, True]
    again = train_py("-m", *TINY, *one_step, "seed=0,1", "loss.beta=1")
    assert again.code == 0
    sessions = [read_json(folder / "provenance.json")["sessions"] for folder in done]
    assert [len(session) for session in sessions] == [1, 1]


def test_a_sweeper_is_given_the_validation_accuracy(tmp_path: Path) -> None:
    """A sweeper that optimizes must not choose anything on the test split."""
    given: list[object] = []

    class Recording(BasicLauncher):
        def launch(self, *arguments: Any) -> Any:
            returned = super().launch(*arguments)
            given.extend(run.return_value for run in returned)
            return returned

    with mock.patch.object(Plugins, "instantiate_launcher", autospec=True) as instantiate:
        launcher = Recording()

        def setup(self: Plugins, **context: Any) -> Recording:
            launcher.setup(**context)
            return launcher

        instantiate.side_effect = setup
        outcome = train_py("-m", *TINY, f"outputs={tmp_path}", "seed=0,1")
    assert outcome.code == 0
    results = [read_json(path) for path in sorted(tmp_path.rglob("result.json"))]
    assert given == [result["val/accuracy"] for result in results]
    assert given != [result["test/accuracy"] for result in results]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("seed=0", "seed=s0"),
        ("seed=0,1,12", "seed=s0,s1,s12"),
        ("seed=s3", "seed=s3"),
        ("seed.root=7", "seed.root=7"),
        ("seed=range(1,4)", "seed=range(1,4)"),
        ("dataset.pool_seed=4", "dataset.pool_seed=4"),
        ("loss=mdpo", "loss=mdpo"),
        ("-m", "-m"),
    ],
)
def test_numbers_are_names_of_seeds(typed: str, meant: str) -> None:
    assert named_seed(typed) == meant


def test_a_guess_is_only_made_where_something_is_near() -> None:
    def said(word: str) -> str:
        options = ["swcw", "swcw_oh", "tsw"]
        return explain(MissingConfigException("long\nwords", f"weighting/{word}", options))

    assert said("swc") == (
        "weighting=swc: no such option, did you mean swcw? choose from swcw, swcw_oh, tsw"
    )
    assert said("xyz") == "weighting=xyz: no such option: choose from swcw, swcw_oh, tsw"


def test_what_a_run_prints_is_what_its_result_says(tmp_path: Path) -> None:
    asked = ("seed=0", "train.samples=1", "train.sample_tokens=6", "weighting=vaw")
    outcome = train_py(*TINY, *asked, f"outputs={tmp_path}")
    assert outcome.code == 0
    assert all("%|" in line for line in outcome.err.splitlines() if line)  # bars alone
    (path,) = tmp_path.rglob("result.json")
    found, lines = read_json(path), outcome.out.splitlines()
    for split in ("val", "test"):
        before, after = found[f"base/{split}_accuracy"], found[f"{split}/accuracy"]
        (row,) = [line.split() for line in lines if line.startswith(f"{split} accuracy")]
        assert row[2:4] == [f"{before:.3f}", f"{after:.3f}"]
        assert row[4] == f"({100 * (after - before):+.1f}"
    for slug, numbers in found["references"].items():
        (row,) = [line.split() for line in lines if line.startswith(slug)]
        keys = ("mean_alpha", "val_accuracy", "test_accuracy", "test_mean_abs_margin")
        assert row[1:] == [f"{numbers[key]:.3f}" for key in keys]
    (sample,) = found["samples"]
    for text in sample.values():
        assert " ".join(text.split())[:60] in " ".join(outcome.out.split())
    assert f"{path.parent}/: result.json, metrics.jsonl, alpha.parquet, adapter/" in lines[-1]
    assert {entry.name for entry in path.parent.iterdir() if entry.name[0] != "."} == {
        "adapter",
        "alpha.parquet",
        "checkpoint",
        "config.yaml",
        "metrics.jsonl",
        "provenance.json",
        "result.json",
        "test_pairs.parquet",
    }
