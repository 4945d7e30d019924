"""What all figures share. One Vega-Lite chart becomes the interactive figure, a PNG and a PDF.

Colors can be distinguished by color-blind readers (after Okabe and Ito 2008) and are visible on
light and dark backgrounds. Whatever a color shows is also shown by a shape or a position, so that
figures can be read in grayscale.
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
"""Width of a figure on paper; on the page a figure is as wide as its container."""
FACET_WIDTH, FACET_HEIGHT = 190, 120
SEQUENTIAL: Any = "viridis"
INK = "currentColor"
"""The text color of the page, light or dark; on paper it is black."""


@dataclass(frozen=True)
class Figure:
    """One figure for one data set."""

    key: str
    section: str
    dataset: str
    title: str
    caption: str
    """What the figure shows and how to read it."""
    chart: Any
    data: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Data frames by the names that the chart uses for them."""

    @property
    def file(self) -> str:
        """Name of the figure's files, without characters that are unusual in one."""
        return re.sub(r"[^\w.=+-]+", "-", f"{self.dataset}-{self.key}")

    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification without data."""
        spec: dict[str, Any] = self.chart.to_dict(validate=False)
        spec.pop("config", None)
        spec.pop("datasets", None)
        if spec.get("width") == "container":
            spec["autosize"] = {"type": "fit-x", "contains": "padding"}
        return spec

    def on_paper(self) -> dict[str, Any]:
        """The Vega-Lite specification with its data, black on white."""
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
    """Configuration of Vega-Lite: thin axes, light grids, ``ink`` for all text."""
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
    """Losses that occur in a frame, in the order of their colors."""
    present = list(dict.fromkeys(frame["loss"]))
    return sorted(present, key=lambda loss: (_combination(loss), loss))


def _combination(loss: str) -> int:
    known = list(LOSS_COLORS)
    name = loss.partition("-")[0]
    return known.index(name) if name in known else len(known)


def loss_color(present: Sequence[str], **options: Any) -> alt.Color:
    """Color by loss; losses without a color of their own, as with a link or clip, are purple."""
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
    """A chart of the data frame ``name`` of its figure."""
    return alt.Chart(alt.NamedData(name))
