"""All runs side by side: which are compared with which, what is missing, what is left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mrpo_lab.report.methods import Method, paper_order
from mrpo_lab.report.reading import RunRecord
from mrpo_lab.report.statistics import standard_error
from mrpo_lab.runs.run_choice import RunChoice, run_choice

REFERENCES = "references"
"""Key of a setting for the references in use."""


@dataclass(frozen=True)
class Study:
    """All runs of a report: as records, and as a table."""

    records: dict[str, RunRecord]
    """Finished runs by the source they were read from."""
    runs: pd.DataFrame
    """One row per run that could be read, indexed by source; ``_row`` lists the columns.

    ``key`` is the ``Method``, by which methods are found; ``method`` is its label."""
    unreadable: list[RunRecord]
    main: dict[str, dict[str, str]]
    """For each data set, the setting that most of its runs share: methods are compared in it."""
    ordered_methods: list[Method]
    """Methods in the order of figures and tables."""
    missing: pd.DataFrame
    """dataset, method, seed, why: cells of the main setting without a finished run."""

    @property
    def datasets(self) -> list[str]:
        return list(self.main)

    @property
    def methods(self) -> list[str]:
        """Labels of the methods, in the order of figures and tables."""
        return [method.label for method in self.ordered_methods]

    @property
    def compared(self) -> pd.DataFrame:
        """Finished runs in the main settings, one for each cell and seed."""
        return self.runs[self.runs["role"] == "compared"]

    def cells(self) -> pd.DataFrame:
        """One row per data set and method: mean accuracies over seeds, with a standard error."""
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

    def best_single(self, dataset: str) -> Method | None:
        """The single-reference method with the highest mean *validation* accuracy.

        Chosen by test accuracy, the best of several would look better than it is. Only methods with
        the largest number of seeds are candidates. None if no single-reference run is compared.
        """
        singles = self.compared[
            (self.compared["dataset"] == dataset) & (self.compared["kind"] == "single")
        ]
        if singles.empty:
            return None
        groups = singles.groupby("key", sort=False)
        full = groups.filter(lambda runs: len(runs) == groups.size().max())
        means = full.groupby("key", sort=False)[["val", "test"]].mean()
        best: Method = means["val"].fillna(means["test"]).idxmax()
        return best


def build_study(
    records: Sequence[RunRecord], given: Mapping[str, RunChoice] | None = None
) -> Study:
    """Arrange records into a study.

    Args:
        given: choices of records that have no configuration (published tables), by source.
    """
    chosen: dict[str, RunChoice] = dict(given or {})
    unreadable = [record for record in records if record.status == "unreadable"]
    for record in records:
        if record.source in chosen or record.status == "unreadable":
            continue
        try:
            chosen[record.source] = run_choice(record.config, record.name)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            problem = f"its config.yaml is not one of this project: {error!r}"
            unreadable.append(RunRecord(record.name, record.source, "unreadable", problem=problem))
    by_source = {record.source: record for record in records if record.source in chosen}
    differing = _differing_parameters(chosen.values())
    runs = pd.DataFrame(
        [
            _row(by_source[source], choice, differing[choice.loss, choice.weighting])
            for source, choice in chosen.items()
        ]
    )
    if runs.empty:
        return Study({}, pd.DataFrame(columns=["role", "dataset"]), unreadable, {}, [], runs)
    runs = runs.set_index("source", drop=False)
    runs.index.name = None
    runs["_order"] = [_sort_key(row, chosen) for row in runs.itertuples()]
    runs = runs.sort_values(["dataset", "_order", "seed"], kind="stable").drop(columns="_order")
    main = {str(d): _main_setting([chosen[s] for s in g.index]) for d, g in runs.groupby("dataset")}
    runs["differs"] = [_differs(chosen[s], main[chosen[s].dataset]) for s in runs.index]
    runs["role"], runs["reason"] = _roles(runs)
    methods = _ordered_methods(runs, chosen)
    return Study(by_source, runs, unreadable, main, methods, _missing(runs, methods))


def _row(record: RunRecord, choice: RunChoice, named: set[str]) -> dict[str, Any]:
    result, method = record.result, Method.of_run(choice, named)
    started = [str(s.get("started", "")) for s in record.sessions]
    return {
        "source": record.source,
        "run": record.name,
        "status": record.status,
        "problem": record.problem,
        "dataset": choice.dataset,
        "model": choice.model,
        "kind": "single" if method.is_single else "multi",
        "key": method,
        "method": method.label,
        "loss": method.loss,
        "weighting": method.weighting_label,
        "reference": choice.reference,
        "seed": choice.seed,
        "k": len(choice.references),
        "train_pairs": result.get("pairs", {}).get("train", np.nan),
        "test_pairs": result.get("pairs", {}).get("test", np.nan),
        "pool": _pool(record),
        "test": _number(result.get("test/accuracy")),
        "val": _number(result.get("val/accuracy")),
        "base": _number(result.get("base/test_accuracy")),
        "base_val": _number(result.get("base/val_accuracy")),
        "steps": record.steps or result.get("steps", 0),
        "started": started[-1] if started else "",
    }


def _pool(record: RunRecord) -> float:
    """Number of pairs from which the splits of every seed are drawn; NaN if it is not known."""
    drawn = record.config.get("dataset", {}).get("pool")
    eligible = record.result.get("counts", {}).get("eligible")
    return float(drawn or eligible or sum(record.result.get("pairs", {}).values()) or np.nan)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _differing_parameters(choices: Iterable[RunChoice]) -> dict[tuple[str, str], set[str]]:
    """For each loss and weighting, the parameters in which runs on one data set differ."""
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


def _sort_key(row: Any, chosen: Mapping[str, RunChoice]) -> tuple[Any, ...]:
    """Single references first, as their set lists them, then methods as in the paper."""
    if row.kind == "single":
        longest = max(
            (c.references for c in chosen.values() if row.reference in c.references), key=len
        )
        return (0, longest.index(row.reference), row.reference)
    choice = chosen[row.source]
    values = tuple((float(v) if _is_number(v) else 0.0, v) for v in choice.parameters.values())
    return (1, *paper_order(choice.loss, choice.weighting), values, row.method)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _setting(choice: RunChoice) -> dict[str, str]:
    return {**choice.setting, REFERENCES: ", ".join(choice.references)}


def _main_setting(choices: Sequence[RunChoice]) -> dict[str, str]:
    """The most frequent setting; runs with a single reference do not count, if there are others,
    since they say nothing about the references in use."""
    several = [c for c in choices if len(c.references) > 1] or list(choices)
    votes: Counter[Any] = Counter(tuple(sorted(_setting(c).items())) for c in several)
    return dict(max(votes, key=lambda items: (votes[items], items)))


def _differs(choice: RunChoice, main: Mapping[str, str]) -> dict[str, str]:
    """Keys in which a run differs from the main setting of its data set, with the run's values."""
    own = _setting(choice)
    if len(choice.references) == 1:
        own[REFERENCES] = main.get(REFERENCES, own[REFERENCES])
    keys = sorted({*own, *main})
    return {k: own.get(k, "not set") for k in keys if own.get(k) != main.get(k)}


def _roles(runs: pd.DataFrame) -> tuple[list[str], list[str]]:
    """What each run is used for, and the reason if it is not compared."""
    newest: dict[tuple[Any, ...], str] = {}
    finished = runs[runs["status"] == "finished"].sort_values("started", kind="stable")
    for row in finished.itertuples():
        newest[_cell(row)] = str(row.source)
    roles, reasons = [], []
    for row in runs.itertuples():
        other = ", ".join(f"{k}={v}" for k, v in row.differs.items())
        kept = newest.get(_cell(row))
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


def _cell(row: Any) -> tuple[Any, ...]:
    """What two runs share if one of them repeats the other."""
    return (row.dataset, row.key, row.seed, tuple(sorted(row.differs.items())))


def _in_main_setting(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[[not differs for differs in runs["differs"]]]


def _ordered_methods(runs: pd.DataFrame, chosen: Mapping[str, RunChoice]) -> list[Method]:
    """Methods of the main settings in order, including references without a run of their own."""
    here = _in_main_setting(runs)
    ordered = here.assign(_o=[_sort_key(row, chosen) for row in here.itertuples()])
    methods = list(dict.fromkeys(ordered.sort_values("_o")["key"]))
    if not (here["kind"] == "single").any():
        return methods
    sets = {chosen[s].references for s in here.index if len(chosen[s].references) > 1}
    singles = [Method.single(slug) for slugs in sorted(sets) for slug in slugs]
    return list(dict.fromkeys([*singles, *methods]))


def _missing(runs: pd.DataFrame, methods: Sequence[Method]) -> pd.DataFrame:
    """Every method with every seed of each data set, without those that are finished."""
    rows = []
    for dataset, group in _in_main_setting(runs).groupby("dataset"):
        done = group[group["role"] == "compared"]
        finished = set(zip(done["key"], done["seed"], strict=True))
        why = {
            (row.key, row.seed): row.reason
            for row in group.itertuples()
            if row.status != "finished"
        }
        rows += [
            {
                "dataset": dataset,
                "method": method.label,
                "seed": seed,
                "why": why.get((method, seed), "no run"),
            }
            for method in methods
            for seed in sorted(set(group["seed"]))
            if (method, seed) not in finished
        ]
    return pd.DataFrame(rows, columns=["dataset", "method", "seed", "why"])
