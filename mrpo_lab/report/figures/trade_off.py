"""What policies reach on several aspects, at each lambda."""

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
from mrpo_lab.report.trade_off import CONDITIONED, METRICS, UNCONDITIONED, trade_offs

MARKS = {
    "base": (GRAY, "cross"),
    CONDITIONED: (BLUE, "circle"),
    UNCONDITIONED: (PURPLE, "triangle-up"),
    "merged": (ORANGE, "square"),
}
"""Color and shape of each policy."""
SINGLE_ASPECT = (GREEN, "diamond")
"""Color and shape of policies that were trained on one aspect."""


def curves(study: Study, dataset: str, metric: str) -> Figure | None:
    """For every two aspects, the metric on one against the other, with one point per lambda."""
    found = trade_offs(study)
    frame = found[(found["dataset"] == dataset) & (found["metric"] == metric)]
    frame = frame[frame["ranked_by"] == "reward"]
    if frame.empty:
        return None
    what = ["method", "policy", "lambda"]
    wide = frame.pivot_table(index=what, columns="aspect", values="value", aggfunc="mean")
    aspects = list(dict.fromkeys(frame["aspect"]))
    parts = [
        wide[[a, b]].set_axis(["x", "y"], axis=1).assign(pair=f"{a} (across), {b} (up)")
        for a, b in combinations(aspects, 2)
    ]
    table = pd.concat(parts).reset_index().round(4)
    table["place"] = table["lambda"].rank(method="dense")  # along the curve, by the first aspect
    policies = list(dict.fromkeys(table["policy"]))
    colors, shapes = zip(*(MARKS.get(p, SINGLE_ASPECT) for p in policies), strict=True)
    base = points("curves").encode(
        x=alt.X("x:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format=".2f")),
        y=alt.Y("y:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format=".2f")),
        color=alt.Color("policy:N", scale=alt.Scale(domain=policies, range=list(colors))),
    )
    line = base.mark_line(strokeWidth=1.5, opacity=0.6).encode(
        order="place:Q", detail=["method:N", "policy:N"]
    )
    dots = base.mark_point(filled=True, size=70, opacity=0.95).encode(
        shape=alt.Shape("policy:N", scale=alt.Scale(domain=policies, range=list(shapes))),
        tooltip=[
            "method:N",
            "policy:N",
            "lambda:N",
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
        "over seeds. Conditioned: one policy, with another lambda in its prompt at each point. "
        "Merged: the adapters of policies that were trained on one aspect, merged with weights "
        "lambda. Up and right is better; a curve that reaches further than the others gives more "
        "of both.",
        chart,
        {"curves": table},
    )
