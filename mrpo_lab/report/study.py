"""All runs side by side: which are compared with which, what is missing, what is left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mrpo_lab.report.choices import Choice, choice_of, order
from mrpo_lab.report.reading import Record
from mrpo_lab.report.statistics import standard_error

REFERENCES = "references"
"""Key of a setting for the references in use."""


@dataclass(frozen=True)
class Study:
    """Runs as a table, and their records."""

    records: dict[str, Record]
    """By source."""
    runs: pd.DataFrame
    """A row a run that could be read, see ``COLUMNS``; index: source."""
    unreadable: list[Record]
    main: dict[str, dict[str, str]]
    """Setting of each dataset that most of its runs share: the one that methods are compared in."""
    methods: list[str]
    """In the order of figures."""
    missing: pd.DataFrame
    """dataset, method, seed, why: cells of the main setting without a finished run."""

    @property
    def datasets(self) -> list[str]:
        return list(self.main)

    @property
    def compared(self) -> pd.DataFrame:
        """Finished runs of the main settings, one for each cell and seed."""
        return self.runs[self.runs["role"] == "compared"]

    def cells(self) -> pd.DataFrame:
        """dataset, method, ...: number of seeds, mean and standard error of accuracies."""
        rows = []
        for (dataset, method), cell in self.compared.groupby(["dataset", "method"], sort=False):
            rows.append(
                {
                    "dataset": dataset,
                    "method": method,
                    "kind": cell["kind"].iloc[0],
                    "seeds": len(cell),
                    "test": cell["test"].mean(),
                    "se": standard_error(cell["test"]),
                    "val": cell["val"].mean(),
                    "base": cell["base"].mean(),
                    "lowest": cell["test"].min(),
                    "highest": cell["test"].max(),
                }
            )
        return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["dataset", "method", "kind"])

    def best_single(self, dataset: str) -> str | None:
        """The single-reference method of highest mean *validation* accuracy: chosen by test
        accuracy, the best of several would look better than it is."""
        cells = self.cells()
        singles = cells[(cells["dataset"] == dataset) & (cells["kind"] == "single")]
        if singles.empty:
            return None
        full = singles[singles["seeds"] == singles["seeds"].max()]
        best = full["val"].fillna(full["test"]).idxmax()
        return str(full.loc[best, "method"])


def study_of(records: Sequence[Record], given: dict[str, Choice] | None = None) -> Study:
    """``given``: choices of records that have no configuration (published tables), by source."""
    chosen: dict[str, Choice] = dict(given or {})
    unreadable = [r for r in records if r.status == "unreadable"]
    for record in records:
        if record.source in chosen or record.status == "unreadable":
            continue
        try:
            chosen[record.source] = choice_of(record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = f"its config.yaml is not one of this project: {error!r}"
            unreadable.append(Record(record.name, record.source, "unreadable", problem=problem))
    by_source = {r.source: r for r in records if r.source in chosen}
    varying = _varying_parameters(chosen.values())
    runs = pd.DataFrame(
        [_row(by_source[source], choice, varying) for source, choice in chosen.items()],
    )
    if runs.empty:
        return Study({}, pd.DataFrame(columns=["role", "dataset"]), unreadable, {}, [], runs)
    runs = runs.set_index("source", drop=False)
    runs.index.name = None
    runs["_order"] = [_place(row, chosen) for row in runs.itertuples()]
    runs = runs.sort_values(["dataset", "_order", "seed"], kind="stable").drop(columns="_order")
    main = {str(d): _main_setting([chosen[s] for s in g.index]) for d, g in runs.groupby("dataset")}
    runs["differs"] = [_differs(chosen[s], main[chosen[s].dataset]) for s in runs.index]
    runs["role"], runs["reason"] = _roles(runs)
    methods = _methods(runs, chosen)
    return Study(by_source, runs, unreadable, main, methods, _missing(runs, methods))


def _row(
    record: Record, choice: Choice, varying: dict[tuple[str, str], set[str]]
) -> dict[str, Any]:
    result = record.result
    shown = varying[choice.loss, choice.weighting]
    suffix = "".join(f" {k}={v}" for k, v in choice.parameters.items() if k in shown)
    single, name = bool(choice.reference), choice.weighting + suffix
    asked = f" · λ {choice.weights}" if choice.weights else ""
    started = [str(s.get("started", "")) for s in record.sessions]
    return {
        "source": record.source,
        "run": record.name,
        "status": record.status,
        "problem": record.problem,
        "dataset": choice.dataset,
        "model": choice.model,
        "kind": "single" if single else "multi",
        "method": (f"dpo: {choice.reference}" if single else f"{choice.loss} · {name}") + asked,
        "loss": "dpo" if single else choice.loss,
        "weighting": "single" if single else name,
        "reference": choice.reference,
        "seed": choice.seed,
        "k": len(choice.references),
        "train_pairs": result.get("pairs", {}).get("train", np.nan),
        "test_pairs": result.get("pairs", {}).get("test", np.nan),
        "test": _number(result.get("test/accuracy")),
        "val": _number(result.get("val/accuracy")),
        "base": _number(result.get("base/test_accuracy")),
        "base_val": _number(result.get("base/val_accuracy")),
        "steps": record.steps or result.get("steps", 0),
        "started": started[-1] if started else "",
    }


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _varying_parameters(choices: Any) -> dict[tuple[str, str], set[str]]:
    """Of each loss and weighting, the parameters that differ between runs of one dataset."""
    seen: dict[tuple[str, str], dict[tuple[str, str], set[str]]] = defaultdict(
        lambda: defaultdict(set)
    )
    for choice in choices:
        for key, value in choice.parameters.items():
            seen[choice.loss, choice.weighting][choice.dataset, key].add(value)
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for method, values in seen.items():
        found[method] = {key for (_, key), several in values.items() if len(several) > 1}
    return found


def _place(row: Any, chosen: dict[str, Choice]) -> tuple[Any, ...]:
    """Single references first, as their set lists them, then methods as in the paper."""
    if row.kind == "single":
        longest = max(
            (c.references for c in chosen.values() if row.reference in c.references), key=len
        )
        return (0, longest.index(row.reference), row.reference)
    choice = chosen[row.source]
    values = tuple((float(v) if _is_number(v) else 0.0, v) for v in choice.parameters.values())
    return (1, *order(choice.loss, choice.weighting), values, row.method)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _setting(choice: Choice) -> dict[str, str]:
    return {**choice.setting, REFERENCES: ", ".join(choice.references)}


def _main_setting(choices: Sequence[Choice]) -> dict[str, str]:
    """The most frequent; a reference trained on alone takes no part in the vote on references."""
    several = [c for c in choices if len(c.references) > 1] or list(choices)
    votes: Counter[Any] = Counter(tuple(sorted(_setting(c).items())) for c in several)
    return dict(max(votes, key=lambda items: (votes[items], items)))


def _differs(choice: Choice, main: dict[str, str]) -> dict[str, str]:
    """What this run has otherwise than the main setting of its dataset, by key."""
    mine = _setting(choice)
    if len(choice.references) == 1:
        mine[REFERENCES] = main.get(REFERENCES, mine[REFERENCES])
    keys = sorted({*mine, *main})
    return {k: mine.get(k, "not set") for k in keys if mine.get(k) != main.get(k)}


def _roles(runs: pd.DataFrame) -> tuple[list[str], list[str]]:
    """What each run is used for, and why not for more."""
    newest: dict[tuple[Any, ...], str] = {}
    finished = runs[runs["status"] == "finished"].sort_values("started", kind="stable")
    for row in finished.itertuples():
        key = (row.dataset, row.method, row.seed, str(row.differs))
        newest[key] = str(row.source)
    roles, reasons = [], []
    for row in runs.itertuples():
        other = ", ".join(f"{k}={v}" for k, v in row.differs.items())
        kept = newest.get((row.dataset, row.method, row.seed, str(row.differs)))
        if row.status != "finished":
            role, reason = "left out", f"{row.status}: {row.problem}"
        elif kept != row.source:
            role, reason = "left out", f"a newer run of the same cell and seed: {kept}"
        elif other:
            role, reason = "other setting", other
        else:
            role, reason = "compared", ""
        roles.append(role)
        reasons.append(reason)
    return roles, reasons


def _methods(runs: pd.DataFrame, chosen: dict[str, Choice]) -> list[str]:
    """Methods of the main settings in order, references that nobody trained on included."""
    here = runs[[not differs for differs in runs["differs"]]]
    ordered = here.assign(_o=[_place(row, chosen) for row in here.itertuples()]).sort_values("_o")
    methods = list(dict.fromkeys(ordered["method"]))
    if not (here["kind"] == "single").any():
        return methods
    sets = {chosen[s].references for s in here.index if len(chosen[s].references) > 1}
    singles = dict.fromkeys(f"dpo: {slug}" for slugs in sorted(sets) for slug in slugs)
    return list(dict.fromkeys([*singles, *methods]))


def _missing(runs: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Every method on every dataset with every seed of that dataset, less what is finished."""
    here = runs[[not differs for differs in runs["differs"]]]
    rows = []
    for dataset, group in here.groupby("dataset"):
        done = group[group["role"] == "compared"]
        finished = set(zip(done["method"], done["seed"], strict=True))
        why = {
            (row.method, row.seed): row.reason
            for row in group.itertuples()
            if row.status != "finished"
        }
        rows += [
            {
                "dataset": dataset,
                "method": method,
                "seed": seed,
                "why": why.get((method, seed), "no run"),
            }
            for method in methods
            for seed in sorted(set(group["seed"]))
            if (method, seed) not in finished
        ]
    return pd.DataFrame(rows, columns=["dataset", "method", "seed", "why"])
