"""Every table of the report: what it holds, and how it is written as CSV, LaTeX and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mrpo_lab.report import mechanism, trade_off
from mrpo_lab.report.comparisons import accuracy_correlations, alpha_correlations
from mrpo_lab.report.study import Study


@dataclass(frozen=True)
class Table:
    """Numbers as they are, and how a reader sees them."""

    key: str
    section: str
    title: str
    caption: str
    frame: pd.DataFrame
    columns: Mapping[str, tuple[str, Callable[[Any], str]]]
    """Of the frame, in order: heading and format."""

    def csv(self) -> str:
        """All columns of the frame, unrounded."""
        return str(self.frame.to_csv(index=False))

    def shown(self) -> pd.DataFrame:
        """Text under headings."""
        return pd.DataFrame(
            {
                heading: [form(value) for value in self.frame[name]]
                for name, (heading, form) in self.columns.items()
            },
            dtype=object,
        )

    def latex(self) -> str:
        """A table environment for booktabs."""
        shown = self.shown()
        for column in shown:
            shown[column] = [_latex(text) for text in shown[column]]
        shown.columns = pd.Index([_latex(column) for column in shown])
        return str(
            shown.style.hide(axis="index").to_latex(
                hrules=True,
                position="t",
                position_float="centering",
                caption=_latex(f"{self.title}. {self.caption}"),
                label=f"tab:{self.key}",
                column_format="".join(
                    "l" if form in WORDS else "r" for _, form in self.columns.values()
                ),
            )
        )

    def html(self) -> str:
        """A table element, every text escaped."""
        return str(self.shown().to_html(index=False, border=0, escape=True, justify="unset"))


def text(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def whole(value: Any) -> str:
    return f"{int(value):,}" if _known(value) else "–"


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if _known(value) else "–"


def points(value: Any) -> str:
    return f"{100 * value:+.1f}" if _known(value) else "–"


def size(value: Any) -> str:
    return f"{100 * value:.1f}" if _known(value) else "–"


def three(value: Any) -> str:
    return f"{value:.3f}" if _known(value) else "–"


def signed(value: Any) -> str:
    return f"{value:+.2f}" if _known(value) else "–"


def p_value(value: Any) -> str:
    if not _known(value):
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(float(value))


WORDS = {text}
TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "τ": r"$\tau$",
    "½": r"$\frac12$",
    "|": r"\textbar{}",
    "≥": r"$\ge$",
    "\n": " ",
}


def _latex(value: str) -> str:
    return "".join(TEX.get(character, character) for character in value)


ABOUT = {"dataset": ("dataset", text), "method": ("method", text)}


def accuracy(study: Study) -> Table:
    return Table(
        "accuracy",
        "accuracy",
        "Accuracy by method",
        "Test accuracy at the end of training, mean and standard error over seeds.",
        study.cells(),
        {
            **ABOUT,
            "seeds": ("seeds", whole),
            "test": ("test", percent),
            "se": ("s.e.", size),
            "lowest": ("lowest", percent),
            "highest": ("highest", percent),
            "val": ("val", percent),
            "base": ("base model", percent),
        },
    )


def missing(study: Study) -> Table:
    return Table(
        "missing",
        "accuracy",
        "Missing cells",
        "Methods without a finished run for a seed that other methods of the dataset have.",
        study.missing,
        {**ABOUT, "seed": ("seed", whole), "why": ("why", text)},
    )


def comparison(frame: pd.DataFrame) -> Table:
    return Table(
        "comparisons",
        "comparisons",
        "Methods against baselines",
        "Difference of test accuracies in points, method minus baseline, on the same seeds and "
        "pairs. Interval: 95 %, bootstrap over test pairs. p (pairs): exact sign-flip test. p "
        "(seeds): corrected resampled t-test. Holm: over all comparisons of the dataset. "
        "Detectable: the smallest difference found with 80 % power at 0.05 over the number of "
        "comparisons.",
        frame,
        {
            **ABOUT,
            "against": ("against", text),
            "baseline": ("baseline", text),
            "seeds": ("seeds", whole),
            "pairs": ("pairs", whole),
            "difference": ("difference", points),
            "low": ("from", points),
            "high": ("to", points),
            "p_pairs": ("p (pairs)", p_value),
            "p_pairs_holm": ("Holm", p_value),
            "p_seeds": ("p (seeds)", p_value),
            "p_seeds_holm": ("Holm ", p_value),
            "detectable": ("detectable", size),
        },
    )


def correlation(study: Study, target: str) -> Table:
    """Tables 1 and 2 of the paper, and the correlation of what they correlate with."""
    kinds: dict[str, tuple[str, Callable[[], pd.DataFrame], str, str]] = {
        "own": (
            "table-1",
            lambda: alpha_correlations(study, "own"),
            "Table 1: weights and the references' own accuracy",
            "Kendall's τ between α (for tsw: the posterior mean) and the references' own test "
            "accuracy, averaged over seeds.",
        ),
        "single": (
            "table-2",
            lambda: alpha_correlations(study, "single"),
            "Table 2: weights and the accuracy of single-reference DPO",
            "Kendall's τ between α (for tsw: the posterior mean) and the test accuracy of DPO on "
            "each reference alone with the same seed, averaged over seeds.",
        ),
        "accuracy": (
            "table-2b",
            lambda: accuracy_correlations(study),
            "Own accuracy and the accuracy of single-reference DPO",
            "Kendall's τ between what Tables 1 and 2 compare weights with, averaged over seeds.",
        ),
    }
    key, frame, title, caption = kinds[target]
    return Table(
        key,
        "correlations",
        title,
        f"{caption} p: exact for that average, ties included, seeds independent; p (one matching): "
        "exact, two-sided, one relabelling of the references for all seeds.",
        frame(),
        {
            **ABOUT,
            "tau": ("mean τ", signed),
            "lowest": ("lowest", signed),
            "highest": ("highest", signed),
            "seeds": ("seeds", whole),
            "references": ("K", text),
            "p_greater": ("p, one-sided", p_value),
            "p_two_sided": ("p, two-sided", p_value),
            "p_holm": ("Holm", p_value),
            "p_one_matching": ("p (one matching)", p_value),
            "why": ("undefined because", text),
        },
    )


def pair_weights(study: Study) -> Table:
    return Table(
        "pair-weights",
        "mechanism",
        "How far references acted",
        "The weight of a pair is the scalar that the loss and the references give its gradient, "
        "over β. Means over steps and seeds. Effective share: effective sample size over batch "
        "size; 100 %: all pairs count alike. Agreement: mean rank correlation, over pairs "
        "of references, of the weights each alone would give the test pairs after training.",
        mechanism.pair_weights(study),
        {
            **ABOUT,
            "mean": ("mean weight", three),
            "cv": ("coefficient of variation", three),
            "p05": ("5th percentile", three),
            "p95": ("95th percentile", three),
            "ess_share": ("effective share", percent),
            "rank_agreement": ("agreement", signed),
        },
    )


def instability(study: Study) -> Table:
    return Table(
        "instability",
        "mechanism",
        "Instability events",
        "Failed runs, numbers that are not finite, gradient norms above "
        f"{mechanism.SPIKE:.0f} times the run's median, runs that end below the base model, pairs "
        "without an opinion.",
        mechanism.instability(study),
        {
            **ABOUT,
            "seed": ("seed", whole),
            "status": ("status", text),
            "events": ("events", text),
        },
    )


def volumes(study: Study) -> Table:
    return Table(
        "trade-off",
        "trade_off",
        "What each policy reaches on all aspects",
        "On the test lists, ranked by implicit reward. Best: over the lambdas that were tried, "
        "each aspect for itself.",
        trade_off.volumes(study),
        {
            **ABOUT,
            "seed": ("seed", whole),
            "policy": ("policy", text),
            "metric": ("metric", text),
            "volume": ("hypervolume", three),
            "best": ("best", text),
        },
    )


def references(study: Study) -> Table:
    return Table(
        "references",
        "references",
        "The references themselves",
        "On the test pairs, means over seeds. |margin| in nats per token. Prefers longer: share of "
        "pairs of unequal length, in the reference's own tokens, where it gives the longer reply "
        "more per token; beside it the share where the label does. Length correlation: Spearman's, "
        "of margin and difference in length.",
        mechanism.references(study),
        {
            "dataset": ("dataset", text),
            "reference": ("reference", text),
            "seeds": ("seeds", whole),
            "accuracy": ("accuracy", percent),
            "se": ("s.e.", size),
            "margin": ("mean |margin|", three),
            "prefers_longer": ("prefers longer", percent),
            "chosen_longer": ("label prefers longer", percent),
            "length_correlation": ("length correlation", signed),
            "gate": ("gate", text),
        },
    )


def all_tables(study: Study, compared: pd.DataFrame, provenance: list[Table]) -> list[Table]:
    """In the order of the page; those without rows are left out."""
    tables = [
        accuracy(study),
        missing(study),
        comparison(compared),
        *(correlation(study, target) for target in ("own", "single", "accuracy")),
        pair_weights(study),
        instability(study),
        volumes(study),
        references(study),
        *provenance,
    ]
    return [table for table in tables if len(table.frame)]
