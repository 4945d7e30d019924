"""Write the report's folder: ``index.html``, ``figures/`` and ``tables/``."""

from __future__ import annotations

from pathlib import Path

import vl_convert

from mrpo_lab.errors import UserError
from mrpo_lab.progress import progress
from mrpo_lab.report import findings, page, provenance
from mrpo_lab.report.comparisons import comparisons
from mrpo_lab.report.figures import Figure, all_figures
from mrpo_lab.report.study import Study
from mrpo_lab.report.tables import ReportTable, all_tables
from mrpo_lab.storage.files import write_whole

SCALE = 2.0
"""Pixels of a PNG per point of the figure."""


def write_report(study: Study, out: Path, refresh: int | None = None) -> Path:
    """Write the report below ``out`` and return the page, which is written last.

    Args:
        refresh: seconds after which the page loads itself again.

    Raises:
        UserError: ``out`` cannot be written.
    """
    compared = comparisons(study)
    figures = all_figures(study, compared)
    tables = all_tables(study, compared, provenance.tables(study))
    runs = {
        str(run.source): provenance.described(study.records[str(run.source)], run)
        for run in study.runs.itertuples()
    }
    html = page.render(
        study,
        figures,
        tables,
        findings.findings(study, {table.key: table.frame for table in tables}),
        findings.running(study),
        runs,
        refresh,
    )
    try:
        _write_tables(tables, out / "tables")
        _write_figures(figures, out / "figures")
        write_whole(out / "index.html", html.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
    return out / "index.html"


def _write_tables(tables: list[ReportTable], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        write_whole(folder / f"{table.key}.csv", table.csv().encode())
        write_whole(folder / f"{table.key}.tex", table.latex().encode())


def _write_figures(figures: list[Figure], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with progress(len(figures), "figures", "figure") as bar:
        for figure in figures:
            spec = figure.on_paper()
            svg = vl_convert.vegalite_to_svg(spec, vl_version=page.VEGA_LITE)
            write_whole(folder / f"{figure.file}.png", vl_convert.svg_to_png(svg, scale=SCALE))
            write_whole(folder / f"{figure.file}.pdf", vl_convert.svg_to_pdf(svg))
            bar.update()
