"""Random overrides: accepted and run, or refused in one line before anything is loaded."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from functools import cache
from random import Random
from typing import Any

from harness import CONF, TINY, compose
from omegaconf import OmegaConf

from mrpo_lab.experiment import Experiment
from torture.place import Place, refused
from torture.process import BrokenError, Finished

VALUES = (
    *("null", "true", "false", "0", "1", "2", "-1", "0.5", "-0.0", "1e-300", "1e308", "nan", "inf"),
    *("9223372036854775808", "1e400", "0x10", "1_000", "''", "' '", "text", "a/b", "../../x", "/x"),
    *("~/x", ".", "..", "[]", "{}", "[1]", "[null]", "[[1]]", "{a: 1}", "{1: 2}", "[nan]", "'[1]'"),
    *("???", "${train.epochs}", "${nothing}", "${oc.env:HOME}", "${", "'\\x1b[31m'", "\x1b[31m"),
    *(
        "é",
        "日本",
        "\u202e",
        "'a b'",
        "a b",
        "a,b",
        "a=b",
        "(",
        "[",
        "'",
        "x" * 300,
        "{_target_: x}",
    ),
)
LIMIT = 12 * 2**30
"""Bytes that a command may take: a huge number must not take the machine."""


def trial(place: Place, random: Random) -> None:
    place.take_scores()
    chosen = [override(random) for _ in range(random.choice([1, 1, 1, 2, 3]))]
    whole = random.random() < 0.15
    command = place.start(
        "train.py", *TINY, *chosen, before=limited if whole else limited_and_before_loading
    )
    done = command.kill_after(20)
    if done.killed:  # it trains, for longer than anybody waits here
        return
    judge(place, done, chosen, whole)


def judge(place: Place, done: Finished, chosen: list[str], whole: bool) -> None:
    if done.code == 0 and "Traceback" not in done.err:
        return
    message = refused(done)
    names = [word for each in chosen for word in each.lstrip("+~").partition("=")[0].split(".")]
    if not any(name and name in message for name in names):
        raise BrokenError(f"the message names none of {', '.join(chosen)}: {message}")
    written = [path for path in place.work.rglob("*") if path.is_file()]
    if written and not whole:
        raise BrokenError(f"refused, but written: {written}")


def override(random: Random) -> str:
    keys, value = list(configuration()), random.choice(VALUES)
    key = random.choice(keys)
    form = random.random()
    if form < 0.1:
        return f"~{key}"
    if form < 0.2:
        return f"+{key.rpartition('.')[0] or 'train'}.{random.choice(['new', 'lr', '_x_'])}={value}"
    if form < 0.25:
        return f"++{key}={value}"
    if form < 0.35:
        group = random.choice([p.name for p in CONF.iterdir() if p.is_dir()])
        return f"{group}={value}"
    return f"{key}={value}"


@cache
def configuration() -> Mapping[str, Any]:
    """Full key and value of every leaf of the configuration."""
    return dict(_leaves(OmegaConf.to_container(compose(*TINY)), ""))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, child in node.items():
            yield from _leaves(child, f"{path}.{key}".lstrip("."))
    else:
        yield path, node


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))


def limited_and_before_loading() -> None:
    """End with code 0 where data and models would be loaded."""
    limited()
    Experiment.prepare = _end  # type: ignore[assignment]


def _end(*_: Any) -> None:
    os._exit(0)
