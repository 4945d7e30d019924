"""Weights of the references: on average, over steps, under Thompson sampling, against accuracy."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from mrpo_lab.report.comparisons import alphas, target_of
from mrpo_lab.report.figures.base import (
    BLUE,
    FACET_WIDTH,
    GREEN,
    ORANGE,
    PURPLE,
    SEQUENTIAL,
    Figure,
    loss_color,
    loss_shape,
    losses,
    points,
)
from mrpo_lab.report.measures import rises
from mrpo_lab.report.study import Study

BINS = 100
"""Most columns of a heat map; with more steps, neighbors are averaged."""
ABOUT = ["dataset", "method", "loss", "weighting", "seed"]


def _multi(study: Study, dataset: str) -> pd.DataFrame:
    runs = study.compared
    return runs[(runs["dataset"] == dataset) & (runs["kind"] == "multi")]


def mean_weights(study: Study, dataset: str) -> Figure | None:
    """Mean weight of each reference under each method."""
    rows = [
        {**{c: getattr(run, c) for c in ABOUT}, "reference": slug, "alpha": value}
        for run in _multi(study, dataset).itertuples()
        for slug, value in alphas(study.records[str(run.source)]).items()
    ]
    if not rows:
        return None
    frame = pd.DataFrame(rows).round(4)
    slugs = list(dict.fromkeys(frame["reference"]))
    methods = [method for method in study.methods if method in set(frame["method"])]
    base = points("weights").encode(
        x=alt.X("reference:N", sort=slugs, title=None, axis=alt.Axis(labelAngle=-35)),
        y=alt.Y("method:N", sort=methods, title=None),
    )
    high = float(frame.groupby(["method", "reference"])["alpha"].mean().max())
    color = alt.Color(
        "mean(alpha):Q",
        title="mean α",
        scale=alt.Scale(scheme=SEQUENTIAL, domain=[0, round(high, 2)]),
    )
    cells = base.mark_rect().encode(
        color=color,
        tooltip=["method:N", "reference:N", alt.Tooltip("mean(alpha):Q", format=".3f")],
    )
    numbers = base.mark_text(fontSize=10).encode(
        text=alt.Text("mean(alpha):Q", format=".2f"),
        color=alt.condition(
            f"datum.mean_alpha > {0.6 * high}", alt.value("black"), alt.value("white")
        ),
    )
    return Figure(
        "weights",
        "alpha",
        dataset,
        "Weight of each reference",
        "Mean over steps and seeds; for Thompson sampling (tsw) the posterior means at the end, "
        "which need not add up to 1.",
        (cells + numbers).properties(width="container", height=20 * len(methods)),
        {"weights": frame},
    )


def over_steps(study: Study, dataset: str) -> Figure | None:
    """Alpha over steps for weightings that change, as in the paper's Figure 3."""
    parts = []
    for run in _multi(study, dataset).itertuples():
        record = study.records[str(run.source)]
        columns = record.series("alpha")
        columns.pop("undecided_pairs", None)
        if not columns:
            continue
        table = pd.DataFrame(columns).assign(step=record.metrics["step"]).dropna()
        if float(table.drop(columns="step").std().max()) < 1e-6:
            continue  # the weights do not change: they are in the figure of mean weights
        width = max(1, int(np.ceil(table["step"].max() / BINS)))
        table["step"] = ((table["step"] - 1) // width * width + 1).astype(int)
        long = table.groupby("step").mean().round(3).reset_index()
        long = long.melt("step", var_name="reference", value_name="alpha")
        parts.append(long.assign(end=long["step"] + width, **{c: getattr(run, c) for c in ABOUT}))
    if not parts:
        return None
    frame = pd.concat(parts, ignore_index=True)
    slugs = list(dict.fromkeys(frame["reference"]))
    methods = [m for m in study.methods if m in set(frame["method"])]
    chart = (
        points("alpha")
        .mark_rect()
        .encode(
            x=alt.X("step:Q", title="step", scale=alt.Scale(nice=False, zero=False)),
            x2="end:Q",
            y=alt.Y("reference:N", sort=slugs, title=None),
            color=alt.Color(
                "mean(alpha):Q",
                title="α, mean over seeds",
                scale=alt.Scale(scheme=SEQUENTIAL, domain=[0, 1], type="sqrt"),
            ),
            tooltip=[
                "method:N",
                "reference:N",
                "step:Q",
                alt.Tooltip("mean(alpha):Q", format=".3f"),
            ],
        )
        .properties(width=FACET_WIDTH + 40, height=15 * len(slugs))
        .facet(facet=alt.Facet("method:N", sort=methods, title=None), columns=3)
        .resolve_axis(x="independent")
    )
    return Figure(
        "alpha-over-steps",
        "alpha",
        dataset,
        "α over steps",
        "One panel for each method whose weights change. For a one-hot method a cell is the share "
        "of seeds that chose this reference at this step; filter by one seed to see its choices. "
        "The color scale is a square root, so that small weights can be distinguished from 0.",
        chart,
        {"alpha": frame},
    )


def posteriors(study: Study, dataset: str) -> Figure | None:
    """Posterior means over steps, as in the paper's Figure 4."""
    parts = []
    for run in _multi(study, dataset).itertuples():
        record = study.records[str(run.source)]
        columns = record.series("bandit/mean")
        if columns:
            table = pd.DataFrame(columns).assign(step=record.metrics["step"]).dropna()
            every = max(1, len(table) // BINS)
            long = table.iloc[::every].melt("step", var_name="reference", value_name="mean")
            parts.append(long.assign(**{c: getattr(run, c) for c in ABOUT}))
    if not parts:
        return None
    frame = pd.concat(parts, ignore_index=True).round(4)
    slugs = list(dict.fromkeys(frame["reference"]))
    y = alt.Y("mean:Q", title="posterior mean", scale=alt.Scale(zero=False))
    base = points("posteriors").encode(x=alt.X("step:Q", title="step"))
    color, order = _by_bandit(study, frame), _bandits(study, frame)
    chart = (
        alt.layer(
            base.mark_errorband(extent="stderr", opacity=0.22).encode(
                y=y, color=alt.Color("method:N", scale=color, legend=None)
            ),
            base.mark_line(strokeWidth=2).encode(
                y=alt.Y("mean(mean):Q", title="posterior mean", scale=alt.Scale(zero=False)),
                color=alt.Color("method:N", scale=color, title=None),
                strokeDash=alt.StrokeDash("method:N", scale=alt.Scale(domain=order), title=None),
                tooltip=["method:N", "step:Q", alt.Tooltip("mean(mean):Q", format=".3f")],
            ),
        )
        .properties(width=150, height=100)
        .facet(facet=alt.Facet("reference:N", sort=slugs, title=None), columns=4)
        .resolve_axis(x="independent")
    )
    return Figure(
        "bandit-posteriors",
        "bandit",
        dataset,
        "Posterior means of Thompson sampling",
        "For each reference the posterior mean of the probability that a step with it raises "
        "accuracy on the probe; mean over seeds with one standard error. The prior mean is ½.",
        chart,
        {"posteriors": frame},
    )


def _bandits(study: Study, frame: pd.DataFrame) -> list[str]:
    return [method for method in study.methods if method in set(frame["method"])]


def _by_bandit(study: Study, frame: pd.DataFrame) -> alt.Scale:
    methods = _bandits(study, frame)
    colors = [BLUE, ORANGE, GREEN, PURPLE]
    return alt.Scale(domain=methods, range=[colors[i % 4] for i in range(len(methods))])


def pulls(study: Study, dataset: str) -> Figure | None:
    """Number of steps in which each reference was drawn."""
    rows = []
    for run in _multi(study, dataset).itertuples():
        record = study.records[str(run.source)]
        slugs = list(record.series("bandit/mean"))
        if slugs:
            arms = record.metrics["bandit/arm"].dropna().astype(int).value_counts()
            about = {c: getattr(run, c) for c in ABOUT}
            rows += [
                {**about, "reference": slug, "pulls": int(arms.get(k, 0))}
                for k, slug in enumerate(slugs)
            ]
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    slugs = list(dict.fromkeys(frame["reference"]))
    methods = _bandits(study, frame)
    y = alt.Y("reference:N", sort=slugs, title=None)
    side = alt.YOffset("method:N", sort=methods)
    shape = alt.Shape("method:N", scale=alt.Scale(domain=methods), title=None)
    base = points("pulls").encode(y=y, yOffset=side)
    color = alt.Color("method:N", scale=_by_bandit(study, frame), title=None)
    chart = base.mark_rule(strokeWidth=1.5).encode(
        x=alt.X("min(pulls):Q", title="steps in which it was drawn"), x2="max(pulls):Q", color=color
    ) + base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("mean(pulls):Q"),
        color=color,
        shape=shape,
        tooltip=["method:N", "reference:N", alt.Tooltip("mean(pulls):Q", format=".1f")],
    )
    return Figure(
        "bandit-pulls",
        "bandit",
        dataset,
        "How often each reference was drawn",
        "Mean over seeds; the line extends from the seed with fewest draws to the one with most.",
        chart.properties(width="container", height=14 * len(methods) * len(slugs)),
        {"pulls": frame},
    )


def rise_shares(study: Study, dataset: str, what: str) -> Figure | None:
    """Shares of steps in which accuracy on ``what`` (probe or batch) fell, stood and rose."""
    columns = {
        "probe": ("bandit/probe_before", "bandit/probe_after"),
        "batch": ("train/accuracy_before", "train/accuracy_after"),
    }[what]
    rows: list[dict[str, Any]] = []
    for run in study.compared[study.compared["dataset"] == dataset].itertuples():
        shares = rises(study.records[str(run.source)], *columns)
        about = {c: getattr(run, c) for c in ABOUT}
        rows += [{**about, "outcome": k, "share": v} for k, v in (shares or {}).items()]
    if not rows:
        return None
    frame = pd.DataFrame(rows).round(4)
    outcomes = ["fell", "stood", "rose"]
    shades = alt.Scale(domain=outcomes, range=["#8c510a", "#c9c9c9", "#5ab4ac"])
    methods = [method for method in study.methods if method in set(frame["method"])]
    y = alt.Y("method:N", sort=methods, title=None)
    # Vega-Lite stacks what it aggregates; the position within the bar is the outcome's order.
    base = (
        points("rises")
        .transform_aggregate(
            share="mean(share)", groupby=["method", "outcome", "loss", "weighting"]
        )
        .transform_calculate(place=f"indexof({outcomes}, datum.outcome)")
    )
    bars = base.mark_bar(height={"band": 0.85}).encode(
        x=alt.X(
            "share:Q",
            title="share of steps",
            axis=alt.Axis(format=".0%"),
            stack="zero",
            scale=alt.Scale(domain=[0, 1]),
        ),
        y=y,
        order="place:Q",
        color=alt.Color("outcome:N", scale=shades, sort=outcomes, title=None),
        tooltip=["method:N", "outcome:N", alt.Tooltip("share:Q", format=".1%")],
    )
    numbers = base.mark_text(fontSize=10).encode(
        x=alt.X("share:Q", stack="zero", bandPosition=0.5),
        y=y,
        order="place:Q",
        detail="outcome:N",
        text=alt.condition("datum.share >= 0.06", alt.Text("share:Q", format=".0%"), alt.value("")),
        color=alt.condition("datum.outcome == 'fell'", alt.value("white"), alt.value("black")),
    )
    subject = {
        "probe": "the policy's accuracy on a new probe of validation pairs (the reward of Thompson "
        "sampling is 1 if it rose)",
        "batch": "the policy's accuracy on the step's own batch",
    }[what]
    return Figure(
        f"rises-{what}",
        "bandit",
        dataset,
        f"Did {what} accuracy rise?",
        f"Shares of steps in which {subject} fell, stood still and rose; mean over seeds.",
        (bars + numbers).properties(width="container", height=20 * len(methods)),
        {"rises": frame},
    )


def weights_against_accuracy(study: Study, dataset: str, target: str) -> Figure | None:
    """Weight of each reference against an accuracy: its own if ``target`` is ``own`` (Table 1), or
    that of single-reference DPO with it if ``target`` is ``single`` (Table 2)."""
    rows = []
    for run in _multi(study, dataset).itertuples():
        record = study.records[str(run.source)]
        goal = target_of(study, run, target)
        about = {c: getattr(run, c) for c in ABOUT}
        rows += [
            {**about, "reference": slug, "alpha": value, "accuracy": goal[slug]}
            for slug, value in alphas(record).items()
            if slug in goal
        ]
    if not rows:
        return None
    frame = pd.DataFrame(rows).round(4)
    means = frame.groupby(["method", "loss", "weighting", "reference"], sort=False)
    frame = means[["alpha", "accuracy"]].mean().reset_index().assign(dataset=dataset).round(4)
    present = losses(frame)
    kinds = list(dict.fromkeys(frame["weighting"]))
    title = "its own test accuracy" if target == "own" else "test accuracy of DPO with it"
    chart = (
        points("pairs")
        .mark_point(filled=True, size=50, opacity=0.8)
        .encode(
            x=alt.X(
                "accuracy:Q", title=title, axis=alt.Axis(format=".0%"), scale=alt.Scale(zero=False)
            ),
            y=alt.Y("alpha:Q", title="α"),
            color=loss_color(present),
            shape=loss_shape(present),
            tooltip=["method:N", "reference:N", alt.Tooltip("accuracy:Q", format=".1%"), "alpha:Q"],
        )
        .properties(width=150, height=95)
        .facet(facet=alt.Facet("weighting:N", title=None, sort=kinds), columns=4)
        .resolve_scale(y="independent")
        .resolve_axis(x="independent")
    )
    return Figure(
        f"weights-against-{target}-accuracy",
        "alpha",
        dataset,
        f"Weight against {title}",
        f"Each mark is a reference: its weight under a method against {title}, means over seeds. "
        f"Table {1 if target == 'own' else 2} has the rank correlations.",
        chart,
        {"pairs": frame},
    )
