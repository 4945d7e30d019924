"""The tables of the report, and how they are written as CSV, LaTeX and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mrpo_lab.report import measures, trade_off
from mrpo_lab.report.comparisons import accuracy_correlations, alpha_correlations
from mrpo_lab.report.study import Study


@dataclass(frozen=True)
class ReportTable:
    """A data frame with a title, a caption, and the format of its columns."""

    key: str
    section: str
    title: str
    caption: str
    frame: pd.DataFrame
    columns: Mapping[str, tuple[str, Callable[[Any], str]]]
    """Heading and format of each column that is shown, in order."""

    def csv(self) -> str:
        """All columns of the frame as CSV, unrounded."""
        return str(self.frame.to_csv(index=False))

    def shown(self) -> pd.DataFrame:
        """The formatted columns under their headings."""
        return pd.DataFrame(
            {
                heading: [form(value) for value in self.frame[name]]
                for name, (heading, form) in self.columns.items()
            },
            dtype=object,
        )

    def latex(self) -> str:
        """A LaTeX table environment; it needs the package booktabs."""
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
                    "l" if form in LEFT_ALIGNED else "r" for _, form in self.columns.values()
                ),
            )
        )

    def html(self) -> str:
        """An HTML table; all text is escaped."""
        return str(self.shown().to_html(index=False, border=0, escape=True, justify="unset"))


UNKNOWN = "–"
"""Stands for a number that is not known."""


def format_text(value: Any) -> str:
    """Text as it is; nothing for a missing value."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def format_int(value: Any) -> str:
    """A whole number: ``1,234``."""
    return f"{int(value):,}" if _known(value) else UNKNOWN


def format_percent(value: Any) -> str:
    """A share as percentage: ``61.5 %``."""
    return f"{100 * value:.1f} %" if _known(value) else UNKNOWN


def format_signed_points(value: Any) -> str:
    """A difference of shares in percentage points: ``+1.2``."""
    return f"{100 * value:+.1f}" if _known(value) else UNKNOWN


def format_points(value: Any) -> str:
    """A size in percentage points, such as a standard error: ``1.2``."""
    return f"{100 * value:.1f}" if _known(value) else UNKNOWN


def format_3f(value: Any) -> str:
    """A number with three decimals."""
    return f"{value:.3f}" if _known(value) else UNKNOWN


def format_signed_2f(value: Any) -> str:
    """A number with its sign and two decimals."""
    return f"{value:+.2f}" if _known(value) else UNKNOWN


def format_2f(value: Any) -> str:
    """A number with two decimals."""
    return f"{value:.2f}" if _known(value) else UNKNOWN


def format_p(value: Any) -> str:
    """A p-value: three decimals, or its magnitude if it is below 0.001."""
    if not _known(value):
        return UNKNOWN
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(float(value))


LEFT_ALIGNED = {format_text}
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
    "χ": r"$\chi$",
    "²": r"$^2$",
    "τ": r"$\tau$",
    "½": r"$\frac12$",
    "|": r"\textbar{}",
    "≥": r"$\ge$",
    "\n": " ",
}


def _latex(value: str) -> str:
    return "".join(TEX.get(character, character) for character in value)


ABOUT = {"dataset": ("dataset", format_text), "method": ("method", format_text)}


def accuracy(study: Study) -> ReportTable:
    return ReportTable(
        "accuracy",
        "accuracy",
        "Accuracy by method",
        "Test accuracy at the end of training, mean and standard error over seeds.",
        study.cells(),
        {
            **ABOUT,
            "seeds": ("seeds", format_int),
            "test": ("test", format_percent),
            "se": ("s.e.", format_points),
            "lowest": ("lowest", format_percent),
            "highest": ("highest", format_percent),
            "val": ("val", format_percent),
            "base": ("base model", format_percent),
        },
    )


def missing(study: Study) -> ReportTable:
    return ReportTable(
        "missing",
        "accuracy",
        "Missing cells",
        "Methods without a finished run for a seed that other methods of the dataset have.",
        study.missing,
        {**ABOUT, "seed": ("seed", format_int), "why": ("why", format_text)},
    )


def comparison(frame: pd.DataFrame) -> ReportTable:
    return ReportTable(
        "comparisons",
        "comparisons",
        "Methods against baselines",
        "Difference of test accuracies in points, method minus baseline, on the same seeds and "
        "pairs. From, to: 95 % interval for another seed and other test pairs of the same pool. p: "
        "the same as a t-test, seeds and prompts being crossed random effects; both from seeds "
        "alone where pairs are not known. Holm: p over all comparisons of the dataset. Detectable: "
        "the smallest difference found with 80 % power at 0.05 over their number. p (pairs): exact "
        "sign-flip test over other test pairs alone, for these trained models. p (seeds): "
        "corrected resampled t-test, from the accuracy of each seed alone.",
        frame,
        {
            **ABOUT,
            "against": ("against", format_text),
            "baseline": ("baseline", format_text),
            "seeds": ("seeds", format_int),
            "pairs": ("pairs", format_int),
            "difference": ("difference", format_signed_points),
            "low": ("from", format_signed_points),
            "high": ("to", format_signed_points),
            "p": ("p", format_p),
            "p_holm": ("Holm", format_p),
            "detectable": ("detectable", format_points),
            "p_pairs": ("p (pairs)", format_p),
            "p_seeds": ("p (seeds)", format_p),
        },
    )


def correlation(study: Study, target: str) -> ReportTable:
    """Tables 1 and 2 of the paper (``own``, ``single``), and the correlation between the accuracies
    that they use (``accuracy``)."""
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
            "Kendall's τ between α (for tsw: the posterior mean) and the test accuracy of DPO "
            "with each reference alone and the same seed, averaged over seeds.",
        ),
        "accuracy": (
            "table-2b",
            lambda: accuracy_correlations(study),
            "Own accuracy and the accuracy of single-reference DPO",
            "Kendall's τ between the two accuracies that Tables 1 and 2 use, averaged over seeds.",
        ),
    }
    key, frame, title, caption = kinds[target]
    return ReportTable(
        key,
        "correlations",
        title,
        f"{caption} p: exact for that average, ties included, seeds independent; p (one matching): "
        "exact, two-sided, permuting the references alike in all seeds. r: Pearson's correlation, "
        "averaged over seeds, with its standard error over seeds.",
        frame(),
        {
            **ABOUT,
            "tau": ("mean τ", format_signed_2f),
            "lowest": ("lowest", format_signed_2f),
            "highest": ("highest", format_signed_2f),
            "seeds": ("seeds", format_int),
            "references": ("K", format_text),
            "p_greater": ("p, one-sided", format_p),
            "p_two_sided": ("p, two-sided", format_p),
            "p_holm": ("Holm", format_p),
            "p_one_matching": ("p (one matching)", format_p),
            "pearson": ("mean r", format_signed_2f),
            "pearson_se": ("s.e. of r", format_2f),
            "why": ("undefined because", format_text),
        },
    )


def bandit_rewards(study: Study) -> ReportTable:
    return ReportTable(
        "bandit-rewards",
        "bandit",
        "Do the arms' rewards differ?",
        "Steps of all seeds of Thompson sampling: a step is rewarded if the policy's accuracy on "
        "its probe of validation pairs rose. Rewarded: over all arms, and for the arms with the "
        "smallest and the largest share. p: chi-square test that all arms have the same share. It "
        "takes steps as independent, and is doubtful if the smallest expected count is below 5.",
        measures.bandit_rewards(study),
        {
            **ABOUT,
            "steps": ("steps", format_int),
            "arms": ("arms", format_int),
            "rewarded": ("rewarded", format_percent),
            "lowest": ("lowest", format_percent),
            "highest": ("highest", format_percent),
            "chi_square": ("χ²", format_2f),
            "degrees": ("d.f.", format_int),
            "p": ("p", format_p),
            "expected": ("smallest expected", format_2f),
        },
    )


def pair_weights(study: Study) -> ReportTable:
    return ReportTable(
        "pair-weights",
        "mechanism",
        "How strongly the references act",
        "The weight of a pair is the scalar that the loss and the references give its gradient, "
        "over β. Means over steps and seeds. Effective share: effective sample size over batch "
        "size; at 100 % all pairs count alike. Agreement: mean rank correlation, over pairs "
        "of references, of the weights each alone would give the test pairs after training.",
        measures.pair_weights(study),
        {
            **ABOUT,
            "mean": ("mean weight", format_3f),
            "cv": ("coefficient of variation", format_3f),
            "p05": ("5th percentile", format_3f),
            "p95": ("95th percentile", format_3f),
            "ess_share": ("effective share", format_percent),
            "rank_agreement": ("agreement", format_signed_2f),
        },
    )


def instability(study: Study) -> ReportTable:
    return ReportTable(
        "instability",
        "mechanism",
        "Instability events",
        "Failed runs, numbers that are not finite, gradient norms above "
        f"{measures.SPIKE:.0f} times the run's median, runs that end below the base model, pairs "
        "to which the weighting gave no weights.",
        measures.instability(study),
        {
            **ABOUT,
            "seed": ("seed", format_int),
            "status": ("status", format_text),
            "events": ("events", format_text),
        },
    )


def volumes(study: Study) -> ReportTable:
    return ReportTable(
        "trade-off",
        "trade_off",
        "What each policy reaches on all aspects",
        "On the test lists, ranked by implicit reward. Best: the highest value of each aspect over "
        "the lambdas that were tried.",
        trade_off.volumes(study),
        {
            **ABOUT,
            "seed": ("seed", format_int),
            "policy": ("policy", format_text),
            "metric": ("metric", format_text),
            "volume": ("hypervolume", format_3f),
            "best": ("best", format_text),
        },
    )


def references(study: Study) -> ReportTable:
    return ReportTable(
        "references",
        "references",
        "The references themselves",
        "On the test pairs, means over seeds. |margin| in nats per token. Prefers longer: share of "
        "pairs of unequal length (in the reference's own tokens) in which the longer reply has the "
        "higher log-probability per token; beside it the share in which the label prefers it. "
        "Length correlation: Spearman's, of margin and difference in length.",
        measures.references(study),
        {
            "dataset": ("dataset", format_text),
            "reference": ("reference", format_text),
            "seeds": ("seeds", format_int),
            "accuracy": ("accuracy", format_percent),
            "se": ("s.e.", format_points),
            "margin": ("mean |margin|", format_3f),
            "prefers_longer": ("prefers longer", format_percent),
            "chosen_longer": ("label prefers longer", format_percent),
            "length_correlation": ("length correlation", format_signed_2f),
            "gate": ("gate", format_text),
        },
    )


def all_tables(
    study: Study, compared: pd.DataFrame, provenance: list[ReportTable]
) -> list[ReportTable]:
    """All tables that have rows, in the order of the page."""
    tables = [
        accuracy(study),
        missing(study),
        comparison(compared),
        bandit_rewards(study),
        *(correlation(study, target) for target in ("own", "single", "accuracy")),
        pair_weights(study),
        instability(study),
        volumes(study),
        references(study),
        *provenance,
    ]
    return [table for table in tables if len(table.frame)]
