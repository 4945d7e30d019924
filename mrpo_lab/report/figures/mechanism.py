"""How strongly the references act, and what they are like."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from mrpo_lab.report.figures.base import (
    BLUE,
    FACET_WIDTH,
    GRAY,
    SEQUENTIAL,
    Figure,
    loss_color,
    loss_shape,
    losses,
    points,
)
from mrpo_lab.report.measures import (
    QUANTILES,
    SWEEPS,
    reference_agreement,
    reference_pairs,
    swept,
)
from mrpo_lab.report.study import Study

ABOUT = ["dataset", "method", "loss", "weighting", "seed"]
BINS = 60


def pair_weights(study: Study, dataset: str) -> Figure | None:
    """Distribution of the pair weights over steps."""
    names = {f"pair_weight/p{q:02}": f"p{q:02}" for q in QUANTILES}
    parts = []
    here = study.compared[study.compared["dataset"] == dataset]
    for run in here[here["kind"] == "multi"].itertuples():
        lines = study.records[str(run.source)].metrics
        if set(names) <= set(lines):
            table = lines[["step", *names]].rename(columns=names).dropna()
            width = max(1, int(np.ceil(len(table) / BINS)))
            table["step"] = (table["step"] - 1) // width * width + 1
            table = table.groupby("step").mean().reset_index()
            parts.append(table.assign(**{c: getattr(run, c) for c in ABOUT}))
    if not parts:
        return None
    frame = pd.concat(parts, ignore_index=True).round(3)
    methods = [m for m in study.methods if m in set(frame["method"])]
    present = losses(frame)
    base = points("quantiles").encode(x=alt.X("step:Q", title="step"))
    color = loss_color(present, legend=None)
    bands = [
        base.mark_area(opacity=opacity).encode(
            y=alt.Y(f"mean({low}):Q", title="weight of a pair"), y2=f"mean({high}):Q", color=color
        )
        for low, high, opacity in (("p05", "p95", 0.22), ("p25", "p75", 0.35))
    ]
    median = base.mark_line(strokeWidth=2).encode(
        y="mean(p50):Q",
        color=color,
        tooltip=[
            "method:N",
            "step:Q",
            *(alt.Tooltip(f"mean(p{q:02}):Q", format=".3f") for q in QUANTILES),
        ],
    )
    chart = (
        alt.layer(*bands, median)
        .properties(width=FACET_WIDTH, height=90)
        .facet(facet=alt.Facet("method:N", sort=methods, title=None), columns=3)
        .resolve_axis(x="independent")
    )
    return Figure(
        "pair-weights",
        "mechanism",
        dataset,
        "Distribution of pair weights",
        "References only re-weight pairs: under every loss the gradient of a pair is a scalar "
        "times the same direction, and the weight is this scalar over β. Line: median over the "
        "batch; bands: 25th to 75th and 5th to 95th percentile. If the band is narrow, all pairs "
        "count alike and the references hardly act.",
        chart,
        {"quantiles": frame},
    )


def against(study: Study, dataset: str, key: str) -> Figure | None:
    """Accuracy against beta, K, or the number of training pairs (``key``)."""
    runs = swept(study, key)
    runs = runs[runs["dataset"] == dataset]
    if runs["x"].nunique() < 2:
        return None
    title = SWEEPS[key]
    present = losses(runs)
    spread = runs["x"].max() / max(runs["x"].min(), 1e-9)
    scale = alt.Scale(type="linear", zero=False, nice=False, padding=12)
    if spread > 8:
        scale = alt.Scale(type="log", nice=False, padding=12)
    ticks = sorted(float(x) for x in set(runs["x"]))
    x = alt.X("x:Q", title=title, scale=scale, axis=alt.Axis(values=ticks, format=".4~r"))
    y: dict[str, Any] = {"axis": alt.Axis(format=".0%"), "scale": alt.Scale(zero=False)}
    base = points("swept").encode(x=x, color=loss_color(present))
    chart = (
        base.mark_errorbar(extent="stderr", ticks=True).encode(
            y=alt.Y("test:Q", title="test accuracy", **y), detail="method:N"
        )
        + base.mark_point(size=26, opacity=0.4, filled=True).encode(y=alt.Y("test:Q", **y))
        + base.mark_line(strokeWidth=2, point={"size": 70, "filled": True}).encode(
            y=alt.Y("mean(test):Q", **y),
            shape=loss_shape(present),
            strokeDash=alt.StrokeDash(
                "method:N",
                title="method",
                legend=alt.Legend(symbolType="stroke", symbolStrokeColor=GRAY, symbolSize=250),
            ),
            tooltip=[
                "method:N",
                alt.Tooltip("x:Q", title=title),
                alt.Tooltip("mean(test):Q", format=".2%"),
                alt.Tooltip("count():Q", title="seeds"),
            ],
        )
    )
    columns = [*ABOUT, "x", "test"]
    return Figure(
        "accuracy-against-" + {"loss.beta": "beta", "dataset.train": "pairs"}.get(key, "k"),
        "mechanism",
        dataset,
        f"Accuracy against {title}",
        "Runs that differ in nothing else. Mean over seeds with one standard error; small marks: "
        "single seeds.",
        chart.properties(width="container", height=220),
        {"swept": runs[columns].round(4)},
    )


def margins(study: Study, dataset: str) -> Figure | None:
    """Distribution of the margins of each reference."""
    table = reference_pairs(study, dataset)
    if table.empty:
        return None
    levels = table.quantile([q / 100 for q in QUANTILES]).T.set_axis(
        [f"p{q:02}" for q in QUANTILES], axis=1
    )
    frame = levels.round(4).rename_axis("reference").reset_index().assign(dataset=dataset)
    base = points("margins").encode(
        y=alt.Y("reference:N", sort=list(table.columns), title=None),
        tooltip=["reference:N", *(f"p{q:02}:Q" for q in QUANTILES)],
    )
    title = "margin on a test pair, nats per token"
    chart = (
        points("zero").mark_rule(strokeDash=[4, 3]).encode(x=alt.X("p50:Q", title=title))
        + base.mark_rule(color=BLUE, strokeWidth=1.5).encode(
            x=alt.X("p05:Q", title=title), x2="p95:Q"
        )
        + base.mark_bar(color=BLUE, height=9).encode(x=alt.X("p25:Q", title=title), x2="p75:Q")
        + base.mark_tick(color="white", thickness=2, height=9).encode(x=alt.X("p50:Q", title=title))
    )
    return Figure(
        "reference-margins",
        "references",
        dataset,
        "Margins of the references",
        "Log-probability of the chosen reply minus that of the rejected one. Bar: 25th to 75th "
        "percentile of the pairs, with a gap at the median; line: 5th to 95th percentile. Right of "
        "0 the reference agrees with the label.",
        chart.properties(width="container", height=20 * len(frame)),
        {"margins": frame, "zero": pd.DataFrame({"p50": [0.0]})},
    )


def agreement(study: Study, dataset: str) -> Figure | None:
    """Share of test pairs that every two references rank alike."""
    table = reference_agreement(study)
    table = table[table["dataset"] == dataset].round(3)
    if table.empty:
        return None
    slugs = list(dict.fromkeys(table["one"]))
    base = points("agreement").encode(
        x=alt.X("one:N", sort=slugs, title=None, axis=alt.Axis(labelAngle=-35)),
        y=alt.Y("other:N", sort=slugs, title=None),
        tooltip=[
            "one:N",
            "other:N",
            alt.Tooltip("alike:Q", format=".1%"),
            alt.Tooltip("spearman:Q", format=".2f"),
        ],
    )
    middle = float(table["alike"].mean())
    chart = base.mark_rect().encode(
        color=alt.Color(
            "alike:Q",
            title="pairs ranked alike",
            scale=alt.Scale(scheme=SEQUENTIAL),
            legend=alt.Legend(format=".0%"),
        )
    ) + base.mark_text(fontSize=10).encode(
        text=alt.Text("alike:Q", format=".0%"),
        color=alt.condition(f"datum.alike > {middle}", alt.value("black"), alt.value("white")),
    )
    return Figure(
        "reference-agreement",
        "references",
        dataset,
        "Agreement between references",
        "Share of test pairs that two references rank alike. Independent references with an "
        "accuracy of one half would agree on half of the pairs.",
        chart.properties(width="container", height=26 * len(slugs)),
        {"agreement": table},
    )
