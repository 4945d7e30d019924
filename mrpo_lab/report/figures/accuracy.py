"""Accuracy by method, over steps, and methods against baselines."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from mrpo_lab.report.figures.base import (
    BLUE,
    FACET_HEIGHT,
    FACET_WIDTH,
    ORANGE,
    Figure,
    loss_color,
    loss_shape,
    losses,
    points,
)
from mrpo_lab.report.study import Study

RUN = ["dataset", "method", "loss", "weighting", "seed", "run"]
"""Columns by which the page filters and finds runs."""


def by_method(study: Study, dataset: str) -> Figure:
    """Test accuracy of every method, as in the paper's Figure 1."""
    runs = study.compared[study.compared["dataset"] == dataset].rename(columns={"source": "id"})
    missing = _missing(study, dataset)
    order = list(study.methods)
    y = alt.Y("method:N", sort=order, title=None, scale=alt.Scale(domain=order))
    x = alt.X("test:Q", title="test accuracy", axis=alt.Axis(format=".0%"), scale=_around(runs))
    present = losses(runs)
    by_loss = [loss_color(present, legend=None), loss_shape(present, legend=None)]
    seeds = (
        points("runs")
        .mark_point(filled=True, size=28, opacity=0.4, cursor="pointer")
        .encode(x=x, y=y, color=by_loss[0], shape=by_loss[1], tooltip=_tooltip())
    )
    error = (
        points("runs")
        .mark_errorbar(extent="stderr", thickness=1.5, ticks={"size": 8})
        .encode(x=x, y=y, color=by_loss[0])
    )
    mean = (
        points("runs")
        .mark_point(filled=True, size=110, opacity=1, stroke="white", strokeWidth=1)
        .encode(
            x=alt.X("mean(test):Q", title="test accuracy", scale=_around(runs)),
            y=y,
            color=by_loss[0],
            shape=by_loss[1],
            tooltip=[
                alt.Tooltip("method:N"),
                alt.Tooltip("mean(test):Q", format=".2%", title="mean"),
                alt.Tooltip("stderr(test):Q", format=".2%", title="standard error"),
                alt.Tooltip("count():Q", title="seeds"),
            ],
        )
    )
    missing_text = (
        points("missing")
        .mark_text(align="left", fontSize=10, fontStyle="italic", opacity=0.8, dx=4)
        .encode(y=y, x=alt.value(0), text="text:N", tooltip=alt.Tooltip("why:N"))
    )
    chart = _lines(study, dataset, x) + error + seeds + mean + missing_text
    return Figure(
        "accuracy-by-method",
        "accuracy",
        dataset,
        "Test accuracy by method",
        "Share of test pairs whose chosen reply has the higher log-probability per token. Large "
        "marks: mean over seeds with its standard error; small marks: single seeds (click one to "
        "see its run). Above: DPO with each reference alone; below: loss · weighting. Dashed line: "
        "the base model; dotted: the single reference that is best on validation.",
        chart.properties(width="container", height=19 * len(order)),
        {
            "runs": _rounded(runs[["id", *RUN, "test", "val", "base"]]),
            "missing": missing,
            "levels": _levels(study, dataset),
        },
    )


def _around(runs: pd.DataFrame) -> alt.Scale:
    values = pd.concat([runs["test"], runs["base"]]).dropna()
    if values.empty:
        return alt.Scale(domain=[0, 1])
    margin = 0.04 * max(float(values.max() - values.min()), 0.02)
    domain = [float(values.min()) - margin, float(values.max()) + margin]
    return alt.Scale(domain=domain, nice=True, zero=False)


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("method:N"),
        alt.Tooltip("seed:O"),
        alt.Tooltip("test:Q", format=".2%"),
        alt.Tooltip("val:Q", format=".2%"),
        alt.Tooltip("run:N"),
    ]


def _levels(study: Study, dataset: str) -> pd.DataFrame:
    """Accuracies of the base model and of the best single reference, drawn as lines."""
    runs = study.compared[study.compared["dataset"] == dataset]
    best = study.best_single(dataset)
    rows = [{"test": runs["base"].mean(), "level": "base model"}]
    if best is not None:
        mean = runs.loc[[key == best for key in runs["key"]], "test"].mean()
        rows.append({"test": mean, "level": f"best single reference ({best.reference})"})
    return _rounded(pd.DataFrame(rows).dropna())


def _lines(study: Study, dataset: str, x: alt.X) -> Any:
    names = list(_levels(study, dataset)["level"])
    dashes = alt.Scale(domain=names, range=[[6, 4], [1, 3]][: len(names)])
    rules = (
        points("levels")
        .mark_rule(strokeWidth=1.3, opacity=0.75)
        .encode(
            x=x,
            strokeDash=alt.StrokeDash("level:N", scale=dashes, title=None),
            tooltip=["level:N", alt.Tooltip("test:Q", format=".2%")],
        )
    )
    return alt.layer(rules)


def _missing(study: Study, dataset: str) -> pd.DataFrame:
    """One row for each method that lacks seeds, with the reasons."""
    table = study.missing[study.missing["dataset"] == dataset]
    rows = []
    for method, group in table.groupby("method", sort=False):
        reasons = group["why"].str.partition(":")[0].value_counts()
        counted = ", ".join(
            f"{n} {'not run' if why == 'no run' else why}" for why, n in reasons.items()
        )
        why = "; ".join(f"seed {r.seed}: {r.why}" for r in group.itertuples())
        rows.append(
            {"method": method, "dataset": dataset, "text": f"missing: {counted}", "why": why}
        )
    return pd.DataFrame(rows, columns=["method", "dataset", "text", "why"])


def over_steps(study: Study, dataset: str, split: str) -> Figure | None:
    """Accuracy over steps on ``split`` (val or test), as in the paper's Figure 2."""
    parts = []
    for row in study.compared[study.compared["dataset"] == dataset].itertuples():
        lines = study.records[str(row.source)].metrics
        if f"{split}/accuracy" not in lines:
            continue
        curve = lines[["step", f"{split}/accuracy"]].dropna()
        curve = curve.set_axis(["step", "accuracy"], axis=1)
        group = "one reference" if row.kind == "single" else row.weighting
        parts.append(curve.assign(group=group, id=row.source, **{c: getattr(row, c) for c in RUN}))
    if not parts:
        return None
    frame = pd.concat(parts)
    groups = list(dict.fromkeys(frame["group"]))
    base = points("curves").encode(
        x=alt.X("step:Q", title="step"),
        color=loss_color(losses(frame), legend=alt.Legend(symbolOpacity=1)),
    )
    several = "datum.weighting != 'single'"
    y: dict[str, Any] = {
        "title": f"{split} accuracy",
        "axis": alt.Axis(format=".0%"),
        "scale": alt.Scale(zero=False),
    }
    seeds = (
        base.transform_filter(several)
        .mark_line(strokeWidth=0.8, opacity=0.3)
        .encode(y=alt.Y("accuracy:Q", **y), detail="id:N")
    )
    band = (
        base.transform_filter(several)
        .mark_errorband(extent="stderr", opacity=0.22)
        .encode(y=alt.Y("accuracy:Q", **y), detail="method:N")
    )
    mean = base.mark_line(strokeWidth=2, point={"size": 34, "filled": True, "opacity": 1}).encode(
        y=alt.Y("mean(accuracy):Q", **y),
        detail="method:N",
        shape=loss_shape(losses(frame)),
        tooltip=[
            alt.Tooltip("method:N"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("mean(accuracy):Q", format=".2%"),
            alt.Tooltip("stderr(accuracy):Q", format=".2%", title="standard error"),
            alt.Tooltip("count():Q", title="seeds"),
        ],
    )
    chart = (
        alt.layer(band, seeds, mean)
        .properties(width=FACET_WIDTH, height=FACET_HEIGHT)
        .facet(facet=alt.Facet("group:N", sort=groups, title=None), columns=3)
        .resolve_axis(x="independent")
    )
    return Figure(
        f"accuracy-over-steps-{split}",
        "steps",
        dataset,
        f"{split.capitalize()} accuracy over steps",
        "One panel per weighting, all on the same scale. Thick lines: mean over seeds, with a band "
        "of one standard error; thin lines: single seeds. In the panel of single references, one "
        "line per reference.",
        chart,
        {"curves": _rounded(frame[["id", *RUN, "group", "step", "accuracy"]])},
    )


def against_baselines(table: pd.DataFrame, study: Study, dataset: str) -> Figure | None:
    """Differences to the baselines with their intervals; those over pairs alone are pale."""
    known = table[["low", "low_pairs"]].notna().any(axis=1)
    here = table[(table["dataset"] == dataset) & known].copy()
    if here.empty:
        return None
    about = study.runs.drop_duplicates("method").set_index("method")[["loss", "weighting"]]
    here = here.join(about, on="method")
    here["clear"] = here["p_holm"] < 0.05
    kinds = ["best single reference", "uniform weights"]
    order = [m for m in study.methods if m in set(here["method"])]
    y = alt.Y("method:N", sort=order, title=None)
    side = alt.YOffset("against:N", sort=kinds, scale=alt.Scale(paddingOuter=0.3))
    color = alt.Color("against:N", scale=alt.Scale(domain=kinds, range=[BLUE, ORANGE]), title=None)
    shape = alt.Shape(
        "against:N", scale=alt.Scale(domain=kinds, range=["circle", "square"]), title=None
    )
    zero = points("zero").mark_rule(strokeWidth=1.2).encode(x="difference:Q")
    title, axis = "difference in test accuracy", alt.Axis(format="+.1~%", tickCount=7)
    wide, narrow = (
        points("differences")
        .mark_rule(strokeWidth=width, opacity=opacity)
        .encode(
            x=alt.X(f"{low}:Q", title=title, axis=axis),
            x2=f"{high}:Q",
            y=y,
            yOffset=side,
            color=color,
        )
        for low, high, width, opacity in (
            ("low", "high", 1.8, 1.0),
            ("low_pairs", "high_pairs", 5.0, 0.3),
        )
    )
    marks = (
        points("differences")
        .mark_point(size=60, strokeWidth=1.8, opacity=1)
        .encode(
            x="difference:Q",
            y=y,
            yOffset=side,
            color=color,
            shape=shape,
            fill=alt.condition("datum.clear", color, alt.value("transparent")),
            tooltip=[
                "method:N",
                alt.Tooltip("baseline:N"),
                alt.Tooltip("difference:Q", format="+.2%"),
                alt.Tooltip("low:Q", format="+.2%"),
                alt.Tooltip("high:Q", format="+.2%"),
                alt.Tooltip("p_holm:Q", format=".3g", title="p (Holm)"),
                alt.Tooltip("detectable:Q", format=".2%", title="smallest detectable"),
            ],
        )
    )
    columns = ["dataset", "method", "loss", "weighting", "against", "baseline", "difference"]
    intervals = ["low", "high", "low_pairs", "high_pairs"]
    return Figure(
        "comparisons",
        "comparisons",
        dataset,
        "Methods against baselines",
        "Difference in test accuracy, mean over seeds. Thin line: 95 % interval for another seed "
        "and other test pairs; wide and pale: for other test pairs alone, with these trained "
        "models. Right of 0: the method is better. Filled: p for another seed and other test pairs "
        "is below 0.05 after Holm's correction; hollow: not shown to differ.",
        (zero + narrow + wide + marks).properties(width="container", height=26 * len(order)),
        {
            "zero": pd.DataFrame({"difference": [0.0]}),
            "differences": _rounded(
                here[[*columns, *intervals, "p_holm", "detectable", "clear"]], 5
            ),
        },
    )


def _rounded(frame: pd.DataFrame, digits: int = 4) -> pd.DataFrame:
    return frame.round(dict.fromkeys(frame.select_dtypes("float").columns, digits))
