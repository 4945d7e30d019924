"""What all figures share: one description gives the page's interactive figure, a PNG and a PDF.

Colours are told apart by the colour-blind (after Okabe and Ito 2008) and stand on light and dark
grounds; what a colour says, a shape or a place says too, so that figures hold in grayscale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import pandas as pd

GRAY, BLUE, ORANGE, GREEN, PURPLE = "#7b7b7b", "#2b7bba", "#d55e00", "#1a936f", "#b565a7"
LOSS_COLORS = {"dpo": GRAY, "mdpo": BLUE, "mrpo": ORANGE, "geometric": GREEN}
LOSS_SHAPES = {"dpo": "circle", "mdpo": "square", "mrpo": "triangle-up", "geometric": "diamond"}
WIDTH = 520
"""Of a figure on paper; on the page a figure is as wide as its place."""
FACET_WIDTH, FACET_HEIGHT = 190, 120
SEQUENTIAL: Any = "viridis"
INK = "currentColor"
"""The page's text colour, light or dark; paper replaces it by black."""


@dataclass(frozen=True)
class Figure:
    """One figure of one dataset."""

    key: str
    section: str
    dataset: str
    title: str
    caption: str
    """What it shows and how it is read."""
    chart: Any
    data: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """By the name under which the chart refers to it."""

    @property
    def file(self) -> str:
        """Name of its files, without what has no place in one."""
        return re.sub(r"[^\w.=+-]+", "-", f"{self.dataset}-{self.key}")

    def spec(self) -> dict[str, Any]:
        """Vega-Lite, without data."""
        spec: dict[str, Any] = self.chart.to_dict(validate=False)
        spec.pop("config", None)
        spec.pop("datasets", None)
        if spec.get("width") == "container":
            spec["autosize"] = {"type": "fit-x", "contains": "padding"}
        return spec

    def on_paper(self) -> dict[str, Any]:
        """Vega-Lite with its data, black on white."""
        spec = self.spec()
        rows = {name: frame.to_dict("records") for name, frame in self.data.items()}
        if spec.get("width") == "container":
            spec["width"] = WIDTH
        heading = f"{self.title} · {self.dataset}"
        return {
            **spec,
            "datasets": rows,
            "title": {"text": heading, "anchor": "start", "fontSize": 13},
            "config": config("#000000", "#ffffff"),
        }


def config(ink: str = INK, ground: str = "transparent") -> dict[str, Any]:
    """Vega-Lite's configuration: thin axes, light grids, ``ink`` for all text."""
    return {
        "background": ground,
        "font": "system-ui, 'Liberation Sans', Arial, sans-serif",
        "title": {"color": ink, "fontWeight": 600},
        "axis": {
            "labelColor": ink,
            "titleColor": ink,
            "domainColor": ink,
            "tickColor": ink,
            "gridColor": ink,
            "gridOpacity": 0.14,
            "domainOpacity": 0.5,
            "tickOpacity": 0.5,
            "titleFontWeight": 500,
            "labelLimit": 260,
            "labelFontSize": 11,
            "titleFontSize": 11,
        },
        "header": {"labelColor": ink, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 11},
        "legend": {
            "labelColor": ink,
            "titleColor": ink,
            "titleFontWeight": 500,
            "orient": "top",
            "labelLimit": 260,
            "columns": 6,
            "labelFontSize": 11,
            "titleFontSize": 11,
        },
        "text": {"color": ink},
        "rule": {"color": ink},
        "view": {"stroke": ink, "strokeOpacity": 0.15},
    }


def losses(frame: pd.DataFrame) -> list[str]:
    """Losses that occur, in the order of their colours."""
    present = list(dict.fromkeys(frame["loss"]))
    return sorted(present, key=lambda loss: (_combination(loss), loss))


def _combination(loss: str) -> int:
    known = list(LOSS_COLORS)
    name = loss.partition("-")[0]
    return known.index(name) if name in known else len(known)


def loss_color(present: Sequence[str], **options: Any) -> alt.Color:
    """Colour by loss; a loss of another name, or with a link or clip, is purple."""
    colors = [LOSS_COLORS.get(loss, PURPLE) for loss in present]
    return alt.Color(
        "loss:N", scale=alt.Scale(domain=list(present), range=colors), title="loss", **options
    )


def loss_shape(present: Sequence[str], **options: Any) -> alt.Shape:
    shapes = [LOSS_SHAPES.get(loss, "cross") for loss in present]
    return alt.Shape(
        "loss:N", scale=alt.Scale(domain=list(present), range=shapes), title="loss", **options
    )


def points(name: str) -> alt.Chart:
    """A chart of the data set ``name`` of its figure."""
    return alt.Chart(alt.NamedData(name))
