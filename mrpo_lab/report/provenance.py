"""Where the numbers come from: runs that are used or left out, code, hardware and cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from mrpo_lab.report.measures import hours
from mrpo_lab.report.reading import RunRecord
from mrpo_lab.report.study import Study
from mrpo_lab.report.tables import ABOUT, ReportTable, format_3f, format_int, format_text


def tables(study: Study) -> list[ReportTable]:
    return [_runs(study), _cost(study), _origins(study), _settings(study)]


def _runs(study: Study) -> ReportTable:
    used = {"compared": "compared", "other setting": "only in figures against β, K or pairs"}
    rows = []
    for run in study.runs.itertuples():
        spent, gpus = hours(study.records[str(run.source)])
        rows.append(
            {
                "run": run.run,
                "dataset": run.dataset,
                "method": run.method,
                "seed": run.seed,
                "status": run.status,
                "used": used.get(run.role, run.role),
                "reason": run.reason,
                "steps": run.steps,
                "hours": spent,
                "gpus": gpus,
                "source": run.source,
            }
        )
    rows += [
        {
            "run": record.name,
            "status": "unreadable",
            "used": "left out",
            "reason": record.problem,
            "source": record.source,
        }
        for record in study.unreadable
    ]
    columns = ["run", "dataset", "method", "seed", "status", "used", "reason", "steps"]
    frame = pd.DataFrame(rows, columns=[*columns, "hours", "gpus", "source"])
    return ReportTable(
        "runs",
        "provenance",
        "Runs",
        "Every run that was found, what it is used for, and the reason if it is not compared.",
        frame,
        {
            **ABOUT,
            "seed": ("seed", format_int),
            "status": ("status", format_text),
            "used": ("used", format_text),
            "reason": ("because", format_text),
            "steps": ("steps", format_int),
            "hours": ("hours", format_3f),
            "run": ("run", format_text),
        },
    )


def _cost(study: Study) -> ReportTable:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for run in study.runs.itertuples():
        spent, gpus = hours(study.records[str(run.source)])
        row = rows.setdefault(
            (run.dataset, run.status),
            {
                "dataset": run.dataset,
                "status": run.status,
                "runs": 0,
                "hours": 0.0,
                "gpu_hours": 0.0,
            },
        )
        row["runs"] += 1
        row["hours"] += spent
        row["gpu_hours"] += spent * gpus
    frame = pd.DataFrame(
        list(rows.values()), columns=["dataset", "status", "runs", "hours", "gpu_hours"]
    )
    total = {
        "dataset": "all",
        "status": "",
        **frame[["runs", "hours", "gpu_hours"]].sum().to_dict(),
    }
    return ReportTable(
        "cost",
        "provenance",
        "Cost",
        "Hours of set-up (reference scores that the run itself computed included) and training. "
        "GPU-hours are hours times the run's GPUs; runs on the CPU have none.",
        pd.concat([frame, pd.DataFrame([total])], ignore_index=True) if len(frame) else frame,
        {
            "dataset": ("dataset", format_text),
            "status": ("status", format_text),
            "runs": ("runs", format_int),
            "hours": ("hours", format_3f),
            "gpu_hours": ("GPU-hours", format_3f),
        },
    )


def _origins(study: Study) -> ReportTable:
    """Each combination of code, libraries and machine, with the number of starts that had it."""
    counted = Counter(
        tuple(_origin(session).items())
        for record in study.records.values()
        for session in record.sessions
    )
    rows = [{**dict(origin), "starts": number} for origin, number in counted.most_common()]
    names = ("commit", "versions", "hardware", "host")
    return ReportTable(
        "origins",
        "provenance",
        "Code, versions and hardware",
        "Each combination that runs were started with, and the number of starts. A + after a "
        "commit: there were changes that were not committed.",
        pd.DataFrame(rows, columns=[*names, "starts"]),
        {**{name: (name, format_text) for name in names}, "starts": ("starts", format_int)},
    )


def _origin(session: dict[str, Any]) -> dict[str, str]:
    git = session.get("git") or {}
    commit = str(git.get("commit") or "unknown")[:12] + ("+" if git.get("changed") else "")
    versions = {"python": session.get("python"), **session.get("versions", {})}
    gpus = Counter(session.get("gpus") or ())
    hardware = ", ".join(f"{n} x {gpu}" for gpu, n in gpus.items()) or f"{session.get('cpus')} CPUs"
    return {
        "commit": commit,
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "hardware": hardware,
        "host": str(session.get("host", "")),
    }


def _settings(study: Study) -> ReportTable:
    """Settings that all compared runs of a data set share."""
    keys = sorted({key for main in study.main.values() for key in main if "_target_" not in key})
    rows = [{"key": key, **{d: study.main[d].get(key, "") for d in study.datasets}} for key in keys]
    return ReportTable(
        "settings",
        "provenance",
        "Settings of the compared runs",
        "The compared runs of a data set share these settings; most of its runs have them.",
        pd.DataFrame(rows, columns=["key", *study.datasets]),
        {"key": ("key", format_text), **{d: (d, format_text) for d in study.datasets}},
    )


def described(record: RunRecord, run: Any) -> dict[str, Any]:
    """What the page shows about a run when its point is clicked."""
    spent, gpus = hours(record)
    session = record.sessions[-1] if record.sessions else {}
    result = record.result
    return {
        "name": record.name,
        "folder": record.source,
        "status": record.status,
        "problem": record.problem,
        "method": run.method,
        "dataset": run.dataset,
        "seed": run.seed,
        "accuracy": {
            key: result.get(key)
            for key in ("base/val_accuracy", "val/accuracy", "base/test_accuracy", "test/accuracy")
        },
        "references": {
            slug: {k: round(v, 4) for k, v in values.items() if isinstance(v, (int, float))}
            for slug, values in result.get("references", {}).items()
        },
        "steps": int(run.steps),
        "hours": round(spent, 3),
        "gpus": gpus,
        "command": " ".join(map(str, session.get("command", ()))),
        "commit": (session.get("git") or {}).get("commit"),
        "started": session.get("started"),
        "counts": {k: v for k, v in result.get("counts", {}).items() if v},
        "traceback": result.get("traceback", ""),
        "samples": result.get("samples", []),
    }
