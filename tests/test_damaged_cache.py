"""Damage of the files of the cache is refused in one line that says what to do, or harmless."""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from test_store import COLUMNS, named, numbers, table

from launchers.scores import is_scored, scored_marker, write_scored_marker
from mrpo_lab import embedded
from mrpo_lab.errors import UserError
from mrpo_lab.storage import tables
from mrpo_lab.storage.__main__ import main
from mrpo_lab.storage.checksums import DamagedError, read_json, without_checksum
from mrpo_lab.storage.contents import MEMOS, content_hash
from mrpo_lab.storage.manifests import check_manifest, manifest, write_manifest
from mrpo_lab.storage.tables import Table
from mrpo_lab.storage.verification import RECORDS, TABLES, left_over

IDS = named("a", "b", "c")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MRPO_LAB_CACHE", str(tmp_path / "cache"))
    tables._announce_unverified.cache_clear()
    embedded._check.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def shard() -> Path:
    table().append(IDS, numbers(IDS))
    (path,) = table().shards()
    return path


@pytest.fixture
def old_shard(shard: Path) -> Path:
    """As earlier versions named it, without a checksum."""
    time = shard.name.partition("-")[0]
    return shard.rename(shard.with_name(f"{time}-{'0a' * 16}.safetensors"))


def refused(path: Path, problem: str) -> None:
    with pytest.raises(DamagedError, match=problem) as caught:
        table().read(IDS)
    assert caught.value.path == path
    assert "delete it" in str(caught.value)
    assert "\n" not in str(caught.value)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class TestShards:
    def test_every_flipped_bit_is_refused(self, shard: Path) -> None:
        content, one = shard.read_bytes(), table()
        with shard.open("r+b", buffering=0) as file:
            for bit in range(8 * len(content)):
                os.pwrite(file.fileno(), flipped(content, bit), 0)
                with pytest.raises(DamagedError, match=r"damaged .* delete it"):
                    one.shard(shard)
            os.pwrite(file.fileno(), content, 0)
        assert one.read(IDS)[1].all()

    @pytest.mark.parametrize("kind", ["shard", "old_shard"])
    def test_every_truncation_is_refused(self, kind: str, request: pytest.FixtureRequest) -> None:
        path: Path = request.getfixturevalue(kind)
        content, one = path.read_bytes(), table()
        for left in range(len(content)):
            path.write_bytes(content[:left])
            with pytest.raises(DamagedError, match=r"damaged .* delete it"):
                one.shard(path)

    @pytest.mark.parametrize(
        "other",
        [("scores", {"of": "another"}), ("gate", {})],
        ids=["of another reference", "of another kind"],
    )
    def test_of_another_table_is_refused(
        self, shard: Path, cache: Path, other: tuple[str, dict[str, str]]
    ) -> None:
        kind, key = other
        elsewhere = Table.open(kind, "other", key, COLUMNS)
        elsewhere.append(IDS, numbers(IDS, salt=1.0))
        (foreign,) = elsewhere.shards()
        foreign.rename(shard.with_name(foreign.name))
        refused(shard.with_name(foreign.name), "its checksum differs")

    def test_that_is_a_folder_or_a_loop(self, shard: Path) -> None:
        shard.unlink()
        shard.mkdir()
        refused(shard, "damaged")
        shard.rmdir()
        shard.symlink_to(shard)
        refused(shard, "damaged")

    def test_without_a_checksum_are_read_and_announced_once(
        self, old_shard: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, logger="mrpo_lab"):
            for _ in range(3):
                np.testing.assert_array_equal(table().read(IDS)[0]["sums"], numbers(IDS)["sums"])
        assert len(caplog.messages) == 1
        assert "unverified" in caplog.text
        caplog.clear()
        table().append(named("d"), numbers(named("d")))
        assert table().read(named("a", "d"))[1].all()
        assert not caplog.text

    @pytest.mark.parametrize(
        ("name", "change", "problem"),
        [
            *(
                ("sums", lambda c, v=v: np.array([v, *c[1:]]), "sums not finite")
                for v in (np.nan, np.inf, -np.inf)
            ),
            ("sums", lambda c: -c, "sums outside"),
            ("counts", lambda c: c * 0, "counts outside"),
            ("counts", lambda c: -c, "counts outside"),
            ("counts", lambda c: c[:2], "counts is incomplete"),
            ("counts", lambda c: c.astype("i4"), "counts is incomplete"),
            ("sums", lambda c: c.astype("f4"), "sums is incomplete"),
            ("sums", lambda c: c[:, None], "sums is incomplete"),
            ("id", lambda c: c[:, :8], "id is incomplete"),
            ("id", lambda c: c.reshape(-1), "id is incomplete"),
            *((name, lambda _: None, f"{name} is incomplete") for name in ("id", *COLUMNS)),
        ],
    )
    def test_without_a_checksum_hold_possible_numbers(
        self, old_shard: Path, name: str, change: Callable[[Any], Any], problem: str
    ) -> None:
        content = load(old_shard.read_bytes())
        content[name] = change(content[name])
        kept = {n: np.ascontiguousarray(c) for n, c in content.items() if c is not None}
        old_shard.write_bytes(save(kept))
        refused(old_shard, problem)

    @pytest.mark.parametrize(
        ("values", "problem"),
        [
            ({"sums": np.array([-1.0, np.nan, -1.0])}, "sums not finite: try dtype"),
            ({"sums": np.array([-1.0, 0.5, -1.0])}, "sums outside"),
            ({"counts": np.array([3, 0, 3])}, "counts outside"),
        ],
    )
    def test_impossible_numbers_are_not_even_added(
        self, values: dict[str, np.ndarray], problem: str
    ) -> None:
        with pytest.raises(UserError, match=problem):
            table().append(IDS, numbers(IDS) | values)
        assert not table().shards()


class TestKey:
    def test_of_another_table_is_refused(self, shard: Path) -> None:
        other = table(of="another").folder
        shutil.rmtree(shard.parent)
        other.rename(shard.parent)
        refused(shard.parent / "key.json", "that of another table")

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"{}", b"\xff", b"[" * 99999])
    def test_that_is_damaged_is_refused_and_made_again(self, shard: Path, content: bytes) -> None:
        key = shard.parent / "key.json"
        sound = key.read_bytes()
        key.write_bytes(content)
        refused(key, "another table|damaged")
        key.unlink()
        assert table().read(IDS)[1].all()
        assert key.read_bytes() == sound


class TestMemo:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "weights"
        file.write_bytes(b"some")
        return file

    @pytest.fixture
    def settled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mrpo_lab.storage.contents.SETTLED", -1.0)

    @pytest.mark.usefixtures("settled")
    def test_a_change_with_the_same_size_and_time_is_seen(self, file: Path) -> None:
        before, times = content_hash(file), file.stat()
        file.write_bytes(b"SOME")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert content_hash(file) != before
        file.unlink()
        file.write_bytes(b"some")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert content_hash(file) == before

    @pytest.mark.usefixtures("settled")
    def test_is_used(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = content_hash(file)
        monkeypatch.setattr("mrpo_lab.storage.contents.hash_file", lambda _: pytest.fail("read"))
        assert content_hash(file) == before

    def test_is_not_made_of_what_has_just_changed(self, file: Path, cache: Path) -> None:
        """Another change within the clock's tick would have the same times."""
        content_hash(file)
        assert not (cache / MEMOS).exists()

    @pytest.mark.usefixtures("settled")
    def test_damage_costs_a_reading(self, file: Path, cache: Path) -> None:
        right = content_hash(file)
        (memo,) = (cache / MEMOS).iterdir()
        content = memo.read_bytes()
        for bit in range(0, 8 * len(content), 13):
            memo.write_bytes(flipped(content, bit))
            assert content_hash(file) == right
        for left in range(0, len(content), 31):
            memo.write_bytes(content[:left])
            assert content_hash(file) == right
        other = file.with_name("other")
        other.write_bytes(b"other")
        content_hash(other)
        (second,) = (m for m in (cache / MEMOS).iterdir() if m != memo)
        second.rename(memo)
        assert content_hash(file) == right

    def test_a_file_that_is_named_by_its_hash_has_it(self, file: Path) -> None:
        blob = file.rename(file.with_name(content_hash(file)))
        file.symlink_to(blob)
        assert content_hash(file) == blob.name
        blob.write_bytes(b"sOme")
        with pytest.raises(UserError, match=rf"{blob}: damaged .*: delete it and {file}"):
            content_hash(file)


class TestMarkers:
    def test_damage_costs_time_only(self) -> None:
        assert not is_scored("key")
        write_scored_marker("key", "slug", 9)
        marker = scored_marker("key")
        content = marker.read_bytes()
        for left in range(len(content) - 1):
            marker.write_bytes(content[:left])
            assert not is_scored("key")
        for bit in range(0, 8 * len(content), 5):
            marker.write_bytes(flipped(content, bit))
            if is_scored("key"):  # white space, or no difference in JSON
                assert without_checksum(read_json(marker)) == {"slug": "slug", "pairs": 9}
        marker.write_bytes(content)
        assert is_scored("key")
        marker.rename(scored_marker("other"))
        assert not is_scored("other")

    def test_of_earlier_versions_count(self) -> None:
        write_scored_marker("key", "slug", 9)
        scored_marker("key").write_text('{"slug": "small", "pairs": 30}')
        assert is_scored("key")


def spoil_a_byte(folder: Path) -> Path:
    file = folder / "tiny-neox" / "model.safetensors"
    file.write_bytes(flipped(file.read_bytes(), 8 * 5000))
    return file


def remove_a_file(folder: Path) -> Path:
    file = folder / "tiny-phi3" / "tokenizer.json"
    file.unlink()
    return file


def add_a_file(folder: Path) -> Path:
    file = folder / "tiny-qwen2" / "model-2.safetensors"
    file.write_bytes(b"x")
    return file


def empty_the_checksums(folder: Path) -> Path:
    manifest(folder).write_bytes(b"")
    return manifest(folder)


def take_checksums_of_another(folder: Path) -> Path:
    write_manifest(folder, "another")
    return manifest(folder.with_name("another")).rename(manifest(folder))


def link_a_file_to_itself(folder: Path) -> Path:
    file = folder / "tiny-phi3" / "tokenizer.json"
    file.unlink()
    file.symlink_to(file)
    return file


class TestModels:
    @pytest.fixture
    def built(self, tiny7_dir: Path, cache: Path) -> Path:
        folder = cache / "models" / tiny7_dir.name
        shutil.copytree(tiny7_dir, folder)
        write_manifest(folder, folder.name)
        return folder

    @pytest.mark.parametrize(
        "spoil",
        [
            spoil_a_byte,
            remove_a_file,
            add_a_file,
            link_a_file_to_itself,
            empty_the_checksums,
            take_checksums_of_another,
        ],
    )
    def test_that_are_embedded(self, built: Path, spoil: Callable[[Path], Path]) -> None:
        assert embedded.folder("tiny7/tiny-neox") == built / "tiny-neox"
        embedded._check.cache_clear()
        file = spoil(built)
        said = rf"^{re.escape(str(file))}: damaged \(.*\): delete {built}"
        with pytest.raises(DamagedError, match=said):
            embedded.folder("tiny7/tiny-neox")

    def test_that_the_disk_cannot_read(self, built: Path) -> None:
        def broken(file: Path) -> str:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

        with pytest.raises(DamagedError, match=r"damaged \(Input/output error\): delete .*; again"):
            check_manifest(built, "again", broken)

    def test_of_an_earlier_version(self, built: Path, caplog: pytest.LogCaptureFixture) -> None:
        manifest(built).unlink()
        with caplog.at_level(logging.INFO, logger="mrpo_lab"):
            for _ in range(3):
                embedded.folder("tiny7/tiny-neox")
        assert len(caplog.messages) == 1


class TestVerify:
    @pytest.fixture
    def full(self, shard: Path, cache: Path, tmp_path: Path) -> Path:
        """A cache with one sound file of each kind."""
        model = cache / "models" / "some"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        write_manifest(model, model.name)
        write_scored_marker("key", "slug", 9)
        os.utime(model / "config.json", (1, 1))
        return cache

    def said(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
        code = main(["verify", *arguments])
        return code, capsys.readouterr().out

    def test_a_sound_cache(self, full: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out = self.said(capsys)
        assert code == 0
        assert [line.split() for line in out.splitlines()[1:]] == [
            ["scores", "2", "0", "0", "0"],
            ["scored", "1", "0", "0", "0"],
            ["models", "1", "0", "0", "0"],
        ]

    @pytest.mark.parametrize(
        "name", ["scores/*/key.json", "scores/*/*.safetensors", "scored/*", "models/some/*"]
    )
    def test_damage_is_named_and_deleted(
        self, full: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        (file,) = full.glob(name)
        file.write_bytes(file.read_bytes()[:-2])
        code, out = self.said(capsys, str(full))
        place = file.parent if "models" in name else file
        assert code == 1
        assert out.count("\ndamaged: ") == 1
        assert f"damaged: {place}: " in out
        assert file.exists()
        code, out = self.said(capsys, "--delete")
        assert code == 0
        assert not place.exists()
        assert self.said(capsys)[1].count("damaged") == 1  # the column's name

    def test_drafts_of_killed_processes(
        self, full: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """They are deleted wherever they are, once no process can be writing them any more."""
        folders = [full / kind / "0a" for kind in TABLES]
        folders += [full / kind for kind in (*RECORDS, "models")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (".old.tmp", ".fresh.tmp"):
                (folder / name).write_bytes(b"a part")
            os.utime(folder / ".old.tmp", (1, 1))
        code, out = self.said(capsys, "--delete")
        assert code == 0
        assert out.count("a draft of a killed process") == len(folders)
        left = sorted(full.glob("**/.*.tmp"))
        assert left == sorted(folder / ".fresh.tmp" for folder in folders)

    def test_a_draft_that_takes_its_place_meanwhile(
        self, full: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Path, "glob", lambda *_: [full / "scored" / ".key.json.0.tmp"])
        assert not left_over(full)

    def test_what_is_old_or_left_over(
        self, full: Path, old_shard: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        scored_marker("key").write_text('{"slug": "small", "pairs": 30}')
        draft, fresh = (old_shard.with_name(f".a.{n}.tmp") for n in (1, 2))
        for file in (draft, fresh):
            file.write_bytes(b"a part")
        os.utime(draft, (1, 1))
        (full / "hashes").mkdir()
        manifest(full / "models" / "some").unlink()
        code, out = self.said(capsys, "--delete")
        assert code == 0
        assert [line.split() for line in out.splitlines()[1:5]] == [
            ["scores", "1", "1", "0", "1"],
            ["scored", "0", "1", "0", "0"],
            ["models", "0", "1", "0", "0"],
            ["hashes", "0", "0", "0", "1"],
        ]
        assert not draft.exists()
        assert not (full / "hashes").exists()
        assert fresh.exists()
        assert old_shard.exists()

    def test_a_folder_that_is_no_cache(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["verify", str(tmp_path / "nothing")]) == 2
        assert "nothing: not a cache" in capsys.readouterr().err

    def test_an_old_store(self, capsys: pytest.CaptureFixture[str]) -> None:
        old = Path(__file__).parent / "fixtures" / "old_runs" / "cache"
        code, out = self.said(capsys, str(old))
        assert code == 0
        assert out.splitlines()[1].split() == ["scores", "2", "2", "0", "0"]
        assert json.loads(next(old.glob("scores/*/key.json")).read_text())["format"] == 1
