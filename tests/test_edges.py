"""The edges of the program: values of every key, names and paths, and disks that are full."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from harness import ROOT, TINY, read_json, train_py
from hydra.core.override_parser.overrides_parser import OverridesParser

from mrpo_lab.command import quoting_advice
from mrpo_lab.data import dataset
from mrpo_lab.errors import UserError
from mrpo_lab.runs.naming import check_name
from mrpo_lab.storage import cache
from mrpo_lab.storage.files import local_path, replacing, replacing_folder, write_whole

pytest_plugins = ("surroundings",)
pytestmark = pytest.mark.usefixtures("surroundings")


def entry(text: str) -> list[str]:
    """Overrides for a reference set of one entry."""
    return [
        "reference_set.anchor=null",
        "reference_set.use=null",
        f"reference_set.entries=[{{{text}}}]",
    ]


VALUES: dict[str, list[str]] = {
    "threads: ": ["threads=0"],
    "threads: Input": ["threads=two"],
    "threads: Input should be a valid integer, got True": ["threads=true"],
    "name: ": ["name="],
    "name: expected text, got 2024": ["name=2024"],
    "outputs: expected text": ["outputs='  '"],
    "protocol.probe_size: ": ["protocol.probe_size=0"],
    "kernels: ": ["kernels=fast"],
    "reference_set.entries.0.slug: expected text, got 7": entry("slug: 7, path: a/b"),
    "reference_set.entries.0.slug: expected text, got None": entry("slug: null, path: a/b"),
    "reference_set.entries.0.slug: expected text, got ''": entry("slug: '', path: a/b"),
    "reference_set.entries.0.slug: required": entry("path: a/b"),
    "reference_set.entries[0]: slug: step": entry("slug: step, path: a/b"),
    "reference_set.entries[0]: slug: undecided_pairs": entry("slug: undecided_pairs, path: a/b"),
    "reference_set.entries[0]: slug must be text": entry('slug: " a", path: a/b'),
    "reference_set.entries.0.path: ": entry("slug: a, path: 7"),
    "reference_set.entries.0.template: ": entry("slug: a, path: a/b, template: 5"),
    "reference_set.entries.0.trust_remote_code: ": entry(
        "slug: a, path: a/b, trust_remote_code: 'no'"
    ),
    "reference_set.entries.0.pth: unknown": entry("slug: a, pth: a/b"),
    "reference_set.use: each reference counts once": ["reference_set.use=[tiny-qwen2,tiny-qwen2]"],
    "model.lora.r: ": ["model.lora={r: 0}"],
    "model.lora.lora_dropout: ": ["model.lora={r: 4, lora_dropout: 1.5}"],
    "model.lora.lora_alpha: expected a finite": ["model.lora={r: 4, lora_alpha: nan}"],
    "model.lora.use_rslora: ": ["model.lora={r: 4, use_rslora: 'no'}"],
    "model.path: expected text, got ''": ["model.path=''"],
    "train.sample_tokens": ["train.samples=1", "train.sample_tokens=0"],
    "dataset.train: expected a finite number": ["dataset.train=nan"],
    "dataset.val: expected a finite number": ["dataset.val=inf"],
    "dataset.pool_seed": ["dataset.pool_seed=-1"],
    "dataset.pool_seed must": ["dataset.pool_seed=4294967296"],
    "dataset.data_seed": ["dataset.data_seed=-1"],
    "loss.beta: expected a finite number": ["loss.beta=inf"],
    "loss.beta: expected a number between": ["loss.beta=1e308"],
    "optimizer.lr: ": ["optimizer.lr=inf"],
    "optimizer.weight_decay: ": ["optimizer.weight_decay=nan"],
    "optimizer.betas.1: ": ["optimizer.betas=[0.9,nan]"],
    "weighting.prior: ": ["weighting=tsw", "weighting.prior=inf"],
    "weighting.weights.0: ": ["weighting=fixed", "weighting.weights=[1e308,1e308,1]"],
    "seed.root: ": ["seed.root=99999999999999999999"],
    "tracker.project: ": ["tracker=wandb", "tracker.project=team/proj"],
    "tracker.tags: ": ["tracker=wandb", f"tracker.tags=[{'x' * 80}]"],
    "tracker.entity: ": ["tracker=wandb", "tracker.entity=a/b"],
    "tracker.entity: expected text": ["tracker=wandb", "tracker.entity="],
}


@pytest.mark.parametrize(("said", "overrides"), VALUES.items(), ids=VALUES.keys())
def test_value_is_refused_with_its_key_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, overrides: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with mock.patch.object(dataset.Dataset, "read", side_effect=AssertionError):
        outcome = train_py(*TINY, f"outputs={tmp_path / 'outputs'}", *overrides)
    assert outcome.code == 2, outcome
    assert outcome.error.startswith(f"error: {said}")
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "outputs"])


@pytest.mark.parametrize(
    "name",
    ["", "  ", "/x", "../x", "a/../..", "a//b", "a/", ".", ".hidden", "~/x", "cache", "sweeps/a"],
)
@pytest.mark.parametrize("mode", [(), ("-m",)], ids=["run", "multirun"])
def test_name_that_leaves_outputs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: tuple[str, ...]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outcome = train_py(*mode, *TINY, "outputs=out", f'name="{name}"')
    assert outcome.code == 2
    (error,) = (line for line in outcome.err.splitlines() if line.startswith("error"))
    assert error.startswith("error: name: ")
    assert "Traceback" not in outcome.err
    assert [path.name for path in tmp_path.rglob("*")] in (
        ["here"],
        ["here", "out", ".multirun"],  # Hydra's own folder
    )
    check_name("a/b-1.c")


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(cache.root(), home / "cache", symlinks=True)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MRPO_LAB_CACHE", "~/cache")
    (home / "plain.jinja").write_text((ROOT / "mrpo_lab/templates/plain.jinja").read_text())
    outcome = train_py("-m", *TINY, 'outputs="~/x"', 'model.template="~/plain.jinja"')
    assert outcome.code == 0, outcome.err
    assert len(list((home / "x").rglob("result.json"))) == 1
    assert list((home / "cache" / "scores").iterdir())
    assert list(here.iterdir()) == []
    assert local_path("~") == home
    for wrong in ("", "~nobody-of-that-name/x"):
        with pytest.raises(UserError):
            local_path(wrong)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "/d/a=b.jsonl",
            "/d/a(b).jsonl",
            "/d/it's.jsonl",
            "/d/naïve.jsonl",
            "~/x",
            "/d/日本.jsonl",
        ),
        *("/d/a[1].jsonl", "a(b)", '/d/a"b', "/d/a#b", "/d/a&b", "a;b", 'a\\"b', "a(\\", "{b}.x"),
    ],
)
def test_value_that_hydra_cannot_read_is_to_be_quoted(tmp_path: Path, value: str) -> None:
    outcome = train_py(*TINY, f"outputs={tmp_path}", f"+dataset.path={value}")
    assert outcome.code == 2
    assert "quote the " in outcome.error
    if value[0] not in "{[":
        (advised,) = shell_words(quoting_advice(f"dataset.path={value}").partition("as in ")[2])
        (parsed,) = OverridesParser.create().parse_overrides([advised])
        assert parsed.value() == value


def shell_words(text: str) -> list[str]:
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


def test_comma_is_a_list_unless_it_is_quoted(tmp_path: Path) -> None:
    outcome = train_py(*TINY, f"outputs={tmp_path}", "dataset.pairs=40,50")
    assert "begin with -m" in outcome.error
    assert "'dataset.pairs=\"40,50\"'" in outcome.error


# --- A finished run and the files that it was made from ---


def pairs(path: Path, word: str) -> None:
    rows = (
        {"prompt": f"Shop {i}?", "chosen": f"{word} {i} steps.", "rejected": f"No {i}."}
        for i in range(20)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_result_of_other_data_is_not_shown(tmp_path: Path, tiny7_dir: Path) -> None:
    file, model = tmp_path / "pairs.jsonl", tmp_path / "model"
    pairs(file, "Walk")
    shutil.copytree(tiny7_dir / "tiny-qwen2", model)
    tiny = [override for override in TINY if not override.startswith("dataset.")]
    command = [*tiny, "dataset=jsonl", f"dataset.path={file}", f"model.path={model}"]
    command += [f"outputs={tmp_path / 'outputs'}", "dataset.val=4", "dataset.test=4"]
    command += ["protocol.probe_size=2"]
    assert train_py(*command).code == 0
    pairs(file, "Walk")  # a new time, the same content
    assert train_py(*command).code == 0
    pairs(file, "Run")
    outcome = train_py(*command)
    assert outcome.code == 2
    assert outcome.error.startswith(f"error: dataset.path: {file} has changed: its data are not ")
    pairs(file, "Walk")
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert train_py(*command).error.startswith(f"error: model.path: {model} has changed")
    (provenance,) = tmp_path.rglob("provenance.json")
    sessions: list[dict[str, Any]] = read_json(provenance)["sessions"]
    for session in sessions:  # as runs were written before
        del session["inputs"]
    provenance.write_text(json.dumps({"sessions": sessions}))
    assert train_py(*command).code == 0


# --- Full disks ---


def test_failed_write_names_the_file_and_leaves_no_draft(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")  # as write(2) raises it: no file is named
    with (
        mock.patch.object(Path, "write_bytes", side_effect=full),
        pytest.raises(OSError, match=r"file\.json") as raised,
    ):
        write_whole(tmp_path / "file.json", b"x")
    assert raised.value.filename == str(tmp_path / "file.json")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(OSError, match="No space") as raised:
        write_a_part(tmp_path / "state.safetensors")
    assert raised.value.errno == 28
    with pytest.raises(OSError, match="adapter"):
        write_a_part_of_a_folder(tmp_path / "adapter", full)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def write_a_part(file: Path) -> None:
    with replacing(file) as draft:
        draft.write_text("a part")
        raise RuntimeError(
            "I/O error: No space left on device (os error 28)"
        )  # as safetensors does


def write_a_part_of_a_folder(folder: Path, error: OSError) -> None:
    with replacing_folder(folder) as draft:
        draft.mkdir()
        raise error


def can_mount() -> bool:
    try:
        subprocess.run(["unshare", "-Urm", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.mark.skipif(not can_mount(), reason="needs a user namespace to mount a small file system")
@pytest.mark.parametrize(
    ("where", "size", "said"),
    [
        ("outputs", "40k", "outputs: cannot write "),
        ("outputs", "3000k", "outputs: cannot write "),
        ("cache", "40k", "cannot write to the cache "),
    ],
)
def test_full_disk_is_named_and_the_command_goes_on(
    tmp_path: Path, tiny7_dir: Path, where: str, size: str, said: str
) -> None:
    """The command on a full file system, and again when it has grown."""
    (tmp_path / "disk").mkdir()
    outputs = tmp_path / ("disk/outputs" if where == "outputs" else "outputs")
    folder = tmp_path / ("disk" if where == "cache" else "cache")
    folder.mkdir(exist_ok=True)
    script = f"""
        mount -t tmpfs -o size={size} tmpfs {tmp_path}/disk
        ln -s {tiny7_dir.parent} {folder}/models
        "$@"; echo code $?
        find {tmp_path}/disk {outputs} -name '*.tmp'
        mount -o remount,size=60m {tmp_path}/disk
        "$@" > /dev/null; echo code $?
    """
    command = [sys.executable, str(ROOT / "train.py"), *TINY, f"outputs={outputs}"]
    done = subprocess.run(
        check=False,
        args=["unshare", "-Urm", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "MRPO_LAB_CACHE": str(folder), "PYTHONPATH": str(ROOT)},
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == [
        "code 2",
        "code 0",
    ], done.stderr
    assert ".tmp" not in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {said}{tmp_path}")
    assert "No space left" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not can_mount(), reason="needs a user namespace to mount a small file system")
def test_each_write_to_the_cache_on_a_full_or_read_only_disk(
    tmp_path: Path, tiny7_dir: Path
) -> None:
    """The disk grows by a few pages at a time, so that it is full once at every file."""
    disk, folder = tmp_path / "disk", tmp_path / "folder"
    disk.mkdir()
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for i in range(4000):
            row = {"prompt": f"Shop {i}?", "chosen": "x" * 500, "rejected": f"No {i}."}
            file.write(json.dumps(row) + "\n")
    program = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "growing_disk.py")]
    done = subprocess.run(
        ["unshare", "-Urm", *program, disk, tiny7_dir / "tiny-neox", folder, "0"],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["drafts"] == []
    assert found["same"]
    place = f"cannot write to the cache {disk}/cache: "
    reasons = [line.removeprefix(place).partition(":")[0] for line in found["said"]]
    assert {*reasons} == {"No space left on device", "Read-only file system"}, found["said"]
    assert reasons.count("No space left on device") > 5
    *refused, read = found["hub"]
    assert not read
    place = f"cannot write to the hub's cache {disk}/hf: "
    assert all(line.startswith(place) and "\n" not in line for line in refused if line), refused
    assert refused[0]
    assert "Read-only" in refused[-1]
