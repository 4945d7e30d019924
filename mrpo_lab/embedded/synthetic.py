"""A made-up preference world: the help desk of a small harbour town, in plain English.

A visitor asks about one of 64 subjects, each with one fact (bread: the bakery). A reply is an
opening, an answer, a detail, sometimes a remark, and a closing. Its latent utility is linear in
four features (``WEIGHTS``):

    on_topic   the answer is about the subject that was asked for, not about another one
    precise    the detail names a number ("4 coins"), not "some coins"
    warmth     the closing is kind (+1), plain (0) or rude (-1)
    filler     the opening is hesitant ("Um,"), not direct ("Of course,")

The utilities of a pair's two replies are at least ``GAP`` apart. The variants of a feature have
about as many words as one another and the remark carries no utility, so length says next to
nothing about preference. Label noise swaps a pair's replies, whatever their utilities.

Row i is a function of (seed, i) alone: rows stream in constant memory, a longer data set begins
with a shorter one, and ``label_noise`` changes which reply is called chosen but never a text.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple, TypeVar

from mrpo_lab.embedded.synthetic_town import (
    AMOUNTS,
    CLOSINGS,
    CONTEXTS,
    DAYS,
    DETAILS,
    NAMES,
    OPENINGS,
    REMARKS,
    SUBJECTS,
    Subject,
)

WEIGHTS = {"on_topic": 1.5, "precise": 1.5, "warmth": 1.0, "filler": -1.0}
GAP = 2.0

Message = dict[str, str]
T = TypeVar("T")


class Features(NamedTuple):
    """What the latent utility sees of a reply."""

    on_topic: bool
    precise: bool
    warmth: int
    filler: bool


def synthetic_rows(n: int, seed: int, label_noise: float = 0.0) -> Iterator[dict[str, str]]:
    """Yield ``n`` pairs {"prompt", "chosen", "rejected"}, their labels wrong at ``label_noise``."""
    if not 0.0 <= label_noise <= 1.0:
        raise ValueError(f"label_noise must be in [0, 1], not {label_noise}")
    for i in range(n):
        rng = Random(f"pair:{seed}:{i}")
        prompt, better, worse = _pair(rng)
        if rng.random() < label_noise:
            better, worse = worse, better
        yield {"prompt": prompt, "chosen": better, "rejected": worse}


def synthetic_corpus(n: int, seed: int, tilt: float = 0.0) -> Iterator[list[Message]]:
    """Yield ``n`` conversations of one or two turns, for pretraining.

    ``tilt`` in [-1, 1] sets how often a reply is the better one of its pair: at 0 both are as
    likely, so the text is neutral to the latent preference; at 1 it is always the better one.
    """
    if not -1.0 <= tilt <= 1.0:
        raise ValueError(f"tilt must be in [-1, 1], not {tilt}")
    for i in range(n):
        rng = Random(f"corpus:{seed}:{i}")
        messages: list[Message] = []
        for _ in range(1 + (rng.random() < 0.25)):
            prompt, better, worse = _pair(rng)
            reply = better if rng.random() < (1.0 + tilt) / 2.0 else worse
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": reply})
        yield messages


def utility(features: Features) -> float:
    """Return the latent utility of a reply, the sum of its weighted features."""
    return sum((WEIGHTS[name] * value for name, value in features._asdict().items()), 0.0)


FEATURES = tuple(
    Features(on_topic, precise, warmth, filler)
    for on_topic in (True, False)
    for precise in (True, False)
    for warmth in (1, 0, -1)
    for filler in (False, True)
)
FEATURE_PAIRS = tuple(
    (better, worse)
    for better in FEATURES
    for worse in FEATURES
    if utility(better) - utility(worse) >= GAP
)


def _pair(rng: Random) -> tuple[str, str, str]:
    """Draw a prompt, its better reply and its worse one."""
    asked = _pick(rng, SUBJECTS)
    question = _pick(rng, asked.topic.questions).format(x=asked.name)
    name, day, number = _pick(rng, NAMES), _pick(rng, DAYS), _pick(rng, AMOUNTS[True])
    context = _pick(rng, CONTEXTS).format(name=name, day=day, number=number)
    better, worse = _pick(rng, FEATURE_PAIRS)
    prompt = f"{context} {question}".lstrip()
    return prompt, _reply(rng, asked, better), _reply(rng, asked, worse)


def _reply(rng: Random, asked: Subject, features: Features) -> str:
    """Render a reply with these features to a question about the subject ``asked``."""
    answered = asked
    while not features.on_topic and answered == asked:
        answered = _pick(rng, SUBJECTS)
    parts = (
        _pick(rng, OPENINGS[features.filler]),
        _pick(rng, answered.topic.answers).format(x=answered.name, y=answered.fact) + ".",
        _pick(rng, DETAILS).format(amount=_pick(rng, AMOUNTS[features.precise])),
        _pick(rng, REMARKS),
        _pick(rng, CLOSINGS[features.warmth]),
    )
    return " ".join(part for part in parts if part)


def _pick(rng: Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]
