"""The figures of the report, collected in ``all_figures``."""

import pandas as pd

from mrpo_lab.report.figures import accuracy, alpha, mechanism, trade_off
from mrpo_lab.report.figures.base import Figure
from mrpo_lab.report.measures import SWEEPS
from mrpo_lab.report.study import Study
from mrpo_lab.report.trade_off import METRICS

__all__ = ["Figure", "all_figures"]


def all_figures(study: Study, compared: pd.DataFrame) -> list[Figure]:
    """All figures that have data, data set by data set, in the order of the page.

    Args:
        compared: the table of comparisons.
    """
    figures = [
        figure
        for dataset in study.datasets
        for figure in (
            accuracy.by_method(study, dataset),
            accuracy.over_steps(study, dataset, "test"),
            accuracy.over_steps(study, dataset, "val"),
            accuracy.against_baselines(compared, study, dataset),
            alpha.mean_weights(study, dataset),
            alpha.over_steps(study, dataset),
            alpha.weights_against_accuracy(study, dataset, "own"),
            alpha.weights_against_accuracy(study, dataset, "single"),
            alpha.posteriors(study, dataset),
            alpha.pulls(study, dataset),
            alpha.rise_shares(study, dataset, "probe"),
            alpha.rise_shares(study, dataset, "batch"),
            mechanism.pair_weights(study, dataset),
            *(mechanism.against(study, dataset, key) for key in SWEEPS),
            *(trade_off.curves(study, dataset, metric) for metric in METRICS),
            mechanism.margins(study, dataset),
            mechanism.agreement(study, dataset),
        )
    ]
    return [figure for figure in figures if figure is not None]
