"""``python -m benchmarks.simulate [OVERRIDE ...]``: the cost of a step and of a sweep, on paper.

Every number is simulated: tokens and operations are counted, times follow from data sheets and
assumptions, which are printed. OVERRIDE is what ``train.py -m`` takes (default: sweep=paper).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from rich.table import Table

from benchmarks.simulate.costs import CARDS, GIB, Cards, Model, Range, Work, seconds
from benchmarks.simulate.layouts import LAYOUTS, Pass
from benchmarks.simulate.sources import (
    file_items,
    named_profiles,
    profile_items,
    shape_of,
)
from benchmarks.simulate.sweeps import SAMPLED, SweepCost
from benchmarks.synthetic_models import PROFILES
from benchmarks.workload import LORA
from mrpo_lab.cli import exit_on_user_error
from mrpo_lab.console import show, text_table
from mrpo_lab.data.texts import Replies
from mrpo_lab.errors import UserError
from mrpo_lab.progress import quiet_libraries
from mrpo_lab.scoring.backend import GPU
from mrpo_lab.storage.files import path_argument

QUANTIZATIONS = ("none", "nf4", "int8")
TIMES = (1, 10, 100)
"""Factors of the number of pairs of a sweep."""


def positive(text: str) -> int:
    """A number of tokens or pairs, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    names = [profile.name for profile in PROFILES]
    made.add_argument("overrides", nargs="*", metavar="OVERRIDE", default=["sweep=paper"])
    made.add_argument("--profiles", nargs="+", default=names, choices=names)
    made.add_argument("--data", help="a file of pairs, whose lengths take the place of profiles")
    made.add_argument("--tokenizer", help="folder or embedded:NAME of the model that reads --data")
    made.add_argument("--max-tokens", type=positive, default=1024, help="of a pair of --data")
    made.add_argument("--batch", type=positive, help="pairs a step (default: the profile's, or 50)")
    made.add_argument(
        "--model",
        default="Qwen/Qwen2.5-0.5B-Instruct",
        help="a name in benchmarks/simulate/models.yaml, a config.json or a folder (%(default)s)",
    )
    made.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    made.add_argument("--quantization", default="none", choices=QUANTIZATIONS)
    made.add_argument("--tokens", nargs="+", type=positive, default=[8192, 32768], metavar="N")
    made.add_argument("--cards", type=path_argument, default=CARDS, help="YAML file (%(default)s)")
    made.add_argument("--only", choices=("step", "sweep"), help="one of the two")
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return made


def steps_of(options: argparse.Namespace) -> dict[str, list[list[Replies]]]:
    """The items of several steps of each profile, or of the data file."""
    if options.data:
        if not options.tokenizer:
            raise UserError("--data: give the model that reads it too: --tokenizer FOLDER")
        items = file_items(options.data, options.tokenizer, options.max_tokens)
        sources = {options.data: (items, options.batch or 50)}
    else:
        sources = {
            p.name: (profile_items(p), options.batch or p.batch)
            for p in named_profiles(options.profiles)
        }
    steps = {}
    for name, (items, batch) in sources.items():
        if len(items) < batch:
            raise UserError(f"{name}: has {len(items)} pairs, fewer than a step: lower --batch")
        starts = range(0, len(items) - batch + 1, batch)[:SAMPLED]
        steps[name] = [list(items[i : i + batch]) for i in starts]
    return steps


def simulated_steps(options: argparse.Namespace, cards: Cards) -> Iterator[dict[str, Any]]:
    """The mean cost of a step for each profile, number of tokens in a pass and layout."""
    shape = shape_of(options.model, True, None if options.full else LORA)
    quantization = None if options.quantization == "none" else options.quantization
    if options.full and quantization:
        raise UserError("--full: quantized weights cannot be trained: leave out --quantization")
    models = {c: Model(shape, quantization, c) for c in (False, True)}
    for (name, steps), budget in product(steps_of(options).items(), options.tokens):
        for layout in LAYOUTS:
            passes = [layout.passes(step, budget, GPU.pad_to_multiple_of) for step in steps]
            yield {
                "profile": name,
                "tokens_a_pass": budget,
                "layout": layout.name,
                "passes": sum(map(len, passes)) / len(passes),
                "tokens": _mean(passes, models[False]).tokens,
                "checkpointing": {
                    "with" if c else "without": _cost(passes, model, cards)
                    for c, model in models.items()
                },
            }


def _mean(steps: Sequence[Sequence[Pass]], model: Model) -> Work:
    return Work.sum(map(model.step, steps)) * (1 / len(steps))


def _cost(steps: Sequence[Sequence[Pass]], model: Model, cards: Cards) -> dict[str, Any]:
    work = _mean(steps, model)
    memory = model.memory([p for step in steps for p in step], training=True)
    reserved = cards.assumed.reserved_gib
    total = [sum(memory) / GIB + more for more in reserved]
    return {
        "flops": work.flops,
        "gib": {key: value / GIB for key, value in memory._asdict().items()} | {"total": total},
        "seconds": {
            name: seconds(work, card, cards.assumed) if total[0] <= card.memory_gib else None
            for name, card in cards.cards.items()
        },
    }


def simulated_sweep(sweep: SweepCost, cards: Cards) -> Iterator[dict[str, Any]]:
    """The GPU-hours of a sweep for each card and layout."""
    for (name, card), layout in product(cards.cards.items(), LAYOUTS):
        hours = {times: sweep.hours(layout, card, cards, times) for times in TIMES}
        yield {
            "card": name,
            "layout": layout.name,
            "gpu_hours": {str(times): found.total for times, found in hours.items()},
            "of_it": hours[1]._asdict(),
            "does_not_fit": sweep.too_large(layout, card, cards),
        }


def between(of: Range | None, digits: int = 3) -> str:
    """A range as text."""
    if of is None:
        return "does not fit"
    low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.{digits}g}" for value in of)
    return low if low == high else f"{low}–{high}"


def titled(title: str, table: Table) -> Table:
    table.title, table.title_justify = f"{title} (simulated)", "left"
    return table


def show_steps(rows: Sequence[dict[str, Any]], cards: Cards) -> None:
    numbers = ("tokens a pass", "passes", "tokens", "TFLOP", *(f"{c}, ms" for c in cards.cards))
    table = text_table("lengths", *numbers[:1], "layout", *numbers[1:], right=numbers)
    for row in rows:
        cost = row["checkpointing"]["without"]
        table.add_row(
            row["profile"],
            f"{row['tokens_a_pass']:,}",
            row["layout"],
            f"{row['passes']:.1f}",
            f"{row['tokens']:,.0f}",
            f"{cost['flops'] / 1e12:.1f}",
            *(between(s and (s[0] * 1e3, s[1] * 1e3), 2) for s in cost["seconds"].values()),
        )
    show(titled("An optimizer step without gradient checkpointing", table))
    parts = ("weights", "trained", "activations", "logits", "total")
    columns = ("tokens a pass", "TFLOP", *parts)
    table = text_table(
        "lengths", "tokens a pass", "layout", "checkpointing", *columns[1:], right=columns
    )
    for row in rows:
        for name, cost in row["checkpointing"].items():
            table.add_row(
                row["profile"],
                f"{row['tokens_a_pass']:,}",
                row["layout"],
                name,
                f"{cost['flops'] / 1e12:.1f}",
                *(f"{cost['gib'][part]:.2f}" for part in parts[:-1]),
                between(cost["gib"]["total"]),
            )
    show(titled("Its memory in GiB", table))


def show_sweep(rows: Sequence[dict[str, Any]], sweep: SweepCost) -> None:
    hours = tuple(f"{n}× the pairs" if n > 1 else "as it is" for n in TIMES)
    parts = ("training", "evaluation", "references")
    right = (*hours, *parts)
    table = text_table("card", "layout", *hours, *parts, "does not fit", right=right)
    for row in rows:
        table.add_row(
            row["card"],
            row["layout"],
            *(between(of) for of in row["gpu_hours"].values()),
            *(between(row["of_it"][part]) for part in parts),
            ", ".join(row["does_not_fit"]),
        )
    what = f"GPU-hours of {sweep.count} runs and {len(sweep.scorings)} scorings by references"
    show(titled(what, table))


def show_assumptions(cards: Cards) -> None:
    table = text_table("assumed of every card", "favorable", "unfavorable")
    for name, (low, high) in vars(cards.assumed).items():
        if not name.startswith("_"):
            table.add_row(name, f"{low:g}", f"{high:g}")
    show(table)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    quiet_libraries()
    options = parser().parse_args(arguments)
    cards = Cards.read(options.cards)
    said: dict[str, Any] = {}
    steps = list(simulated_steps(options, cards)) if options.only != "sweep" else []
    sweep = SweepCost.of(options.overrides) if options.only != "step" else None
    hours = list(simulated_sweep(sweep, cards)) if sweep else []
    if options.json:
        said = {"step": steps, "sweep": hours}
        content = {"overrides": options.overrides, "model": options.model, "simulated": said}
        print(json.dumps(content, indent=2))
        return 0
    show_assumptions(cards)
    if steps:
        show_steps(steps, cards)
    if sweep:
        show_sweep(hours, sweep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
