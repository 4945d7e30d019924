"""One self-contained page: figures, tables, findings and runs, with the library that draws them.

All text comes from runs and is not trusted: Jinja escapes what it writes into HTML, and data is
JSON whose ``<`` are escaped, in elements that the browser does not run. The page may load nothing.
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
"""The version that the figures are written for."""
SECTIONS = {
    "accuracy": "Accuracy by method",
    "comparisons": "Comparisons",
    "steps": "Accuracy over steps",
    "alpha": "Weights of the references",
    "bandit": "Bandit and batch accuracy",
    "correlations": "Do weights follow accuracy?",
    "mechanism": "Mechanism",
    "trade_off": "Trade-off between aspects",
    "references": "References",
    "provenance": "Provenance",
}
NOTES = {
    "comparisons": "Each method is compared with the single reference whose DPO runs have the "
    "highest mean accuracy on validation (chosen by test accuracy, the best of several would look "
    "better than it is), and with uniform weights under the same loss. Two kinds of chance are "
    "kept apart. Pairs: would other test pairs from the same source say the same of these trained "
    "models? The seeds' test sets come from one pool and overlap, so a pair that several seeds "
    "test counts as one observation: the bootstrap draws it with all its seeds, and the exact test "
    "flips all its differences together. Seeds: would other training runs say the same? Seeds "
    "share training and test pairs, so the t-test's variance is that of Nadeau and Bengio (2003), "
    "s² (1/S + test/train). With few seeds it can show little; a result that is clear over pairs "
    "and not over seeds is one about these trained models.",
    "correlations": "A reference is one model, the same in every seed. The p-values that the paper "
    "gives (one-sided, two-sided) take seeds for independent trials of which reference is which; "
    "where weights and accuracies hardly change with the seed, they are too small. The last column "
    "permutes the references once for all seeds: exact for any dependence between seeds, and the "
    "one to believe when they differ. No p of Tables 1 and 2 says that weights cause accuracy.",
    "trade_off": "Volume: of what lies below and left of a policy's points, from 0 on all aspects; "
    "at most 1, larger where some lambda gives much of all. The base model's implicit reward "
    "against itself is 0 for every reply, which ranks as chance does.",
    "mechanism": "For every one of these losses a pair's gradient is a scalar times the gradient "
    "of the policy's own margin. All that references can do is change this scalar.",
}


@lru_cache(maxsize=1)
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
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
    """The page. ``runs``: what is shown of a run when it is clicked, by its id in the figures.
    ``refresh``: seconds after which the page loads itself again."""
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
    """Values that the reader can choose from."""
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
    """Loss and weighting of every method, by which rows of tables are filtered."""
    if not len(study.runs):
        return {}
    first = study.runs.drop_duplicates("method")
    return {
        row.method: {"loss": row.loss, "weighting": row.weighting} for row in first.itertuples()
    }


def columns(frame: pd.DataFrame) -> dict[str, Any]:
    """A table by column; text as codes into its distinct values, since it repeats."""
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
    """JSON that can stand in a script element; what is not finite becomes null."""
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
