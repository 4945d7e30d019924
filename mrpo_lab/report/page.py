"""Render the report as one HTML page that contains its data and the library that draws it.

Text from runs is not trusted: Jinja escapes what it writes into HTML, and data is JSON with ``<``
escaped, in elements that the browser does not run. The page's security policy forbids it to load
anything.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

import pandas as pd
import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mrpo_lab.report.figures.base import Figure, config
from mrpo_lab.report.study import Study
from mrpo_lab.report.tables import ReportTable

VEGA_LITE = "6.4"
"""Version of Vega-Lite that the figures are written for."""
SECTIONS = {
    "accuracy": "Accuracy by method",
    "comparisons": "Comparisons",
    "steps": "Accuracy over steps",
    "alpha": "Weights of the references",
    "bandit": "Thompson sampling and batch accuracy",
    "correlations": "Correlation of weights and accuracy",
    "mechanism": "Mechanism",
    "trade_off": "Trade-off between aspects",
    "references": "References",
    "provenance": "Provenance",
}
NOTES = {
    "comparisons": "Each method is compared with the single reference whose DPO runs have the "
    "highest mean accuracy on validation (chosen by test accuracy, the best of several would look "
    "better than it is), and with uniform weights under the same loss. The interval and p speak "
    "of another seed and other test pairs at once: would another training run, tested on other "
    "pairs of the same pool, show the same? They do not cover another pool of pairs to train on, "
    "or other settings. All seeds' test sets come from one pool and overlap, so the variance of "
    "the mean difference is s²/S, from the spread of the S seeds, plus what seeds share because "
    "they test the same pairs; pairs of one prompt count as one observation. With three seeds "
    "there are few degrees of freedom, and only large differences are found: see the column "
    "detectable. p (pairs) asks less: would other test pairs show the same for these trained "
    "models? Alone it is no evidence that another seed would repeat a difference.",
    "correlations": "A reference is the same model in every seed. The p-values that the paper "
    "gives (one-sided, two-sided) take seeds as independent; if weights and accuracies hardly "
    "change with the seed, they are too small. The column p (one matching) permutes the references "
    "alike in all seeds: it is exact for any dependence between seeds, and the one to trust if the "
    "p-values differ. None of them says that weights cause accuracy.",
    "trade_off": "Hypervolume: the volume between 0 and a policy's points, at most 1; it is large "
    "if some lambda does well on all aspects. The implicit reward of the base model is 0 for every "
    "reply, so that it ranks replies at random.",
    "mechanism": "Under each of these losses the gradient of a pair is a scalar times the gradient "
    "of the policy's own margin. References can only change this scalar.",
}


@lru_cache(maxsize=1)
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script."""
    script = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE))
    return script.replace("</script", "<\\/script")


def render(
    study: Study,
    figures: Sequence[Figure],
    tables: Sequence[ReportTable],
    findings: Mapping[str, Sequence[str]],
    progress: Sequence[Mapping[str, object]],
    runs: Mapping[str, Any],
    refresh: int | None = None,
) -> str:
    """Render the page as HTML.

    Args:
        findings: sentences by data set.
        progress: runs that are still running; see ``findings.running``.
        runs: what is shown about a run when it is clicked, by its id in the figures.
        refresh: seconds after which the page loads itself again; None if it does not.
    """
    folder = files("mrpo_lab.report") / "template"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((folder / "page.html").read_text())
    content = {
        "figures": [
            {
                "spec": figure.spec(),
                "data": {name: columns(frame) for name, frame in figure.data.items()},
            }
            for figure in figures
        ],
        "config": config(),
        "methods": methods(study),
        "runs": runs,
    }
    counts = study.runs["status"].value_counts().to_dict() if len(study.runs) else {}
    if study.unreadable:
        counts["unreadable"] = len(study.unreadable)
    return template.render(
        title="Report",
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        counts=counts,
        findings=findings,
        progress=progress,
        sections=[
            {
                "key": key,
                "title": title,
                "note": NOTES.get(key, ""),
                "figures": [(i, f) for i, f in enumerate(figures) if f.section == key],
                "tables": [(t, Markup(t.html())) for t in tables if t.section == key],
            }
            for key, title in SECTIONS.items()
        ],
        filters=filters(study),
        refresh=refresh,
        style=Markup((folder / "page.css").read_text()),
        vega=Markup(vega()),
        script=Markup((folder / "page.js").read_text()),
        content=Markup(safe_json(content)),
    )


def filters(study: Study) -> dict[str, list[str]]:
    """Values that the reader can filter by; a filter with a single value is left out."""
    if not len(study.runs):
        return {}
    runs = study.runs[study.runs["role"].isin(["compared", "other setting"])]
    chosen = {
        "dataset": list(dict.fromkeys(runs["dataset"])),
        "loss": list(dict.fromkeys(runs["loss"])),
        "weighting": list(dict.fromkeys(runs["weighting"])),
        "seed": [str(seed) for seed in sorted(set(runs["seed"]))],
    }
    return {name: values for name, values in chosen.items() if len(values) > 1}


def methods(study: Study) -> dict[str, dict[str, str]]:
    """Loss and weighting of every method, by which the rows of tables are filtered."""
    if not len(study.runs):
        return {}
    first = study.runs.drop_duplicates("method")
    return {
        row.method: {"loss": row.loss, "weighting": row.weighting} for row in first.itertuples()
    }


def columns(frame: pd.DataFrame) -> dict[str, Any]:
    """A data frame by column; text, which repeats, as codes into its distinct values."""
    packed: dict[str, Any] = {}
    for name in frame:
        column = frame[name]
        if pd.api.types.is_numeric_dtype(column):
            packed[name] = column.tolist()
        else:
            codes, values = pd.factorize(column)
            packed[name] = {"values": list(map(str, values)), "codes": codes.tolist()}
    return packed


def safe_json(content: Any) -> str:
    """JSON that is safe inside a script element; numbers that are not finite become null."""
    text = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(v) for v in value]
    return value
