"""Weightings: how alpha, the weights of the references, is chosen once per optimizer step."""

from mrpo_lab.objective.weighting.base import Context, Weighting, to_simplex
from mrpo_lab.objective.weighting.offline import RMC, VAW, VDW, VSW, Fixed, Grid, Single, Uniform
from mrpo_lab.objective.weighting.online import ARWC, SWCW, TSW, SWCWOneHot

__all__ = [
    "ARWC",
    "RMC",
    "SWCW",
    "TSW",
    "VAW",
    "VDW",
    "VSW",
    "Context",
    "Fixed",
    "Grid",
    "SWCWOneHot",
    "Single",
    "Uniform",
    "Weighting",
    "to_simplex",
]
