"""Ordinary mistakes: one line says what is wrong, where, and what to do next."""

from __future__ import annotations

import re
from random import Random

from harness import CONF, TINY

from torture.kinds.overrides import configuration
from torture.place import Place, refused
from torture.process import BrokenError

TRAIN: tuple[tuple[str, tuple[str, ...]], ...] = (
    # what the line has to say, and what was typed
    ("optimizer.lr", ("lr=1e-4",)),
    ("loss.beta", ("beta=0.1",)),
    ("train.epochs", ("epochs=3",)),
    ("--lr", ("--lr", "1e-4")),
    ("model=", ("model=gpt2",)),
    ("dataset=", ("dataset=pairs.jsonl",)),
    ("dataset.path", ("dataset=jsonl",)),
    ("nowhere.jsonl", ("dataset=jsonl", "dataset.path=nowhere.jsonl")),
    ("/no/model", ("model.path=/no/model",)),
    ("begin with -m", ("seed=s0,s1",)),
    ("seed", ("seed=1.5",)),
    ("loss", ("loss",)),
    ("loss.beta", ("loss.beta=",)),
    ("loss.beta", ("loss.beta=high",)),
    ("train", ("train",)),
    ("experiment=", ("experiment=mine",)),
    ("reference_set.use", ("reference_set.use=tiny-qwen2",)),
    ("nobody", ("reference_set.use=[nobody]",)),
    ("weights", ("weighting=fixed",)),
    ("slug", ("weighting=single", "weighting.slug=qwen")),
    ("quote", ("dataset=jsonl", "dataset.path=my pairs (1).jsonl")),
    ("dataset", ("dataset.val=500",)),
    ("outputs", ("outputs=/dev/null",)),
    ("threads", ("threads=many",)),
    ("too few", ("dataset.pairs=3",)),
    ("batch_size", ("train.batch_size=0",)),
    ("dtype", ("model.dtype=fp16",)),
)
OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("nowhere", ("mrpo_lab.report", "nowhere")),
    ("no runs", ("mrpo_lab.report", ".")),
    ("no sweep", ("launchers", "status")),
    ("outputs", ("mrpo_lab.report",)),
    ("nowhere", ("mrpo_lab.merging", "nowhere", "here")),
)


def trial(place: Place, random: Random) -> None:
    form = random.random()
    if form < 0.5:
        typo(place, random)
    elif form < 0.9:
        said, words = random.choice(TRAIN)
        files = any(word.startswith("dataset=") for word in words)  # which know no dataset.pairs
        tiny = [word for word in TINY if not (files and word.startswith("dataset."))]
        says(place, said, "train.py", *tiny, *words)
    else:
        said, words = random.choice(OTHERS)
        says(place, said, *words)


def says(place: Place, said: str, *words: str) -> None:
    message = refused(place.start(*words).wait())
    if said not in message:
        raise BrokenError(f"{' '.join(words)}: the message does not say {said!r}: {message}")
    if not re.search(r"[:;,] ", message):
        raise BrokenError(f"what, but not where or what to do: {message}")


def typo(place: Place, random: Random) -> None:
    """A slip of the fingers in a key or an option: what was meant is offered."""
    if random.random() < 0.5:
        key = random.choice(
            [k for k in configuration() if "." in k and k.count(".") < 2 and "._" not in k]
        )
        head, _, meant = key.rpartition(".")
        wrong = f"{head}.{slip(meant, random)}=1"
    else:
        group = random.choice(["loss", "weighting", "dataset", "model", "train", "optimizer"])
        meant = random.choice(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        wrong = f"{group}={slip(meant, random)}"
    typed = wrong.partition("=")[0].rpartition(".")[2] if "." in wrong else wrong.partition("=")[2]
    if typed in [each.rpartition(".")[2] for each in configuration()] or typed == meant:
        return  # another word that exists
    message = refused(place.start("train.py", *TINY, wrong).wait())
    if meant not in message:
        raise BrokenError(f"{wrong}: the message does not offer {meant}: {message}")


def slip(word: str, random: Random) -> str:
    """Two letters changed places, one was lost, doubled or replaced by another."""
    at = random.randrange(len(word))
    return random.choice(
        [
            word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :] or "x",
            word[: at + 1] + word[at:],
            word[:at] + "q" + word[at + 1 :],
        ]
    )
