"""What one policy reaches on several aspects, by the lambda that it is told."""

from __future__ import annotations

from itertools import combinations

import altair as alt
import pandas as pd

from mrpo_lab.report.figures.base import (
    BLUE,
    FACET_WIDTH,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    Figure,
    points,
)
from mrpo_lab.report.study import Study
from mrpo_lab.report.trade_off import METRICS, TOLD, UNTOLD, trade_offs

COLORS = {"base": GRAY, TOLD: BLUE, UNTOLD: PURPLE, "merged": ORANGE}
SHAPES = {"base": "cross", TOLD: "circle", UNTOLD: "triangle-up", "merged": "square"}
ALONE = (GREEN, "diamond")
"""Policies of one aspect alone."""


def curves(study: Study, dataset: str, metric: str) -> Figure | None:
    """For every two aspects, the metric on one against the other, a point a lambda."""
    found = trade_offs(study)
    frame = found[(found["dataset"] == dataset) & (found["metric"] == metric)]
    frame = frame[frame["ranked_by"] == "reward"]
    if frame.empty:
        return None
    what = ["method", "policy", "told"]
    wide = frame.pivot_table(index=what, columns="aspect", values="value", aggfunc="mean")
    aspects = list(dict.fromkeys(frame["aspect"]))
    parts = [
        wide[[a, b]].set_axis(["x", "y"], axis=1).assign(pair=f"{a} (across), {b} (up)")
        for a, b in combinations(aspects, 2)
    ]
    table = pd.concat(parts).reset_index().round(4)
    table["place"] = table["told"].rank(method="dense")  # along the curve, by the first aspect
    policies = list(dict.fromkeys(table["policy"]))
    colors = [COLORS.get(policy, ALONE[0]) for policy in policies]
    shapes = [SHAPES.get(policy, ALONE[1]) for policy in policies]
    base = points("curves").encode(
        x=alt.X("x:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format=".2f")),
        y=alt.Y("y:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format=".2f")),
        color=alt.Color("policy:N", scale=alt.Scale(domain=policies, range=colors)),
    )
    line = base.mark_line(strokeWidth=1.5, opacity=0.6).encode(
        order="place:Q", detail=["method:N", "policy:N"]
    )
    dots = base.mark_point(filled=True, size=70, opacity=0.95).encode(
        shape=alt.Shape("policy:N", scale=alt.Scale(domain=policies, range=shapes)),
        tooltip=[
            "method:N",
            "policy:N",
            alt.Tooltip("told:N", title="lambda"),
            alt.Tooltip("x:Q", format=".3f"),
            alt.Tooltip("y:Q", format=".3f"),
        ],
    )
    chart = (
        alt.layer(line, dots)
        .properties(width=2 * FACET_WIDTH, height=240)
        .facet(facet=alt.Facet("pair:N", title=None), columns=2)
        .resolve_scale(x="independent", y="independent")
    )
    return Figure(
        f"trade-off-{metric}",
        "trade_off",
        dataset,
        f"Trade-off between aspects: {METRICS[metric]}",
        "How well the implicit rewards rank the replies of the test lists by each aspect, means "
        "over seeds. Told: one policy, told another lambda at each point. Merged: the adapters "
        "of policies of one aspect alone, merged with weights lambda. Up and right is better; a "
        "curve that reaches further than the others gives more of both.",
        chart,
        {"curves": table},
    )
