"""The page in a real browser: Debian's chromium, without a network."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import SLUGS, make_run, make_study
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from mrpo_lab.report.__main__ import main

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SCRIPT = "<script>window.broken = true</script><img src=x onerror='window.broken = true'>"

if not (CHROMIUM and DRIVER) and not os.environ.get("MRPO_LAB_REQUIRE_CHROMIUM"):
    pytest.skip("no chromium: apt-get install chromium chromium-driver", allow_module_level=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, settings beside the main one, and runs that failed, run and were torn."""
    runs, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("report")
    make_study(runs, seeds=2)
    for weighting in ("uniform", "vaw"):
        for seed in range(2):
            make_run(runs, "village", weighting=weighting, seed=seed, gain=0.1)
            make_run(runs, weighting=weighting, seed=seed, suffix="b", loss__beta=1.0)
            make_run(runs, weighting=weighting, seed=seed, suffix="t", dataset__train=100)
            make_run(runs, weighting=weighting, seed=seed, suffix="k", reference_set__use=SLUGS[:2])
    make_run(runs, weighting="vaw", seed=5, status="failed", error=SCRIPT, traceback=SCRIPT)
    make_run(runs, weighting="vaw", seed=6, status="running", steps=7)
    evil = make_run(
        runs, f"{SCRIPT.replace('/', '')}", weighting="vaw", slugs=("a<b>", "<i>c", "d")
    )
    result = json.loads((evil / "result.json").read_text())
    result["samples"] = [{"prompt": SCRIPT, "before": "</script>" + SCRIPT, "after": "-->"}]
    result["gate"] = [{"slug": "a<b>", "problem": SCRIPT}]
    (evil / "result.json").write_text(json.dumps(result))
    (make_run(runs, weighting="vaw", seed=7) / "result.json").write_text("{")
    assert main([str(runs), "--out", str(out)]) == 0
    return out


class Page:
    """A loaded page, and what it asks of the browser."""

    def __init__(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for argument in ("--headless=new", "--no-sandbox", f"--window-size={width},900"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver: Any = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.open(path)

    def open(self, path: Path, fragment: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(f"file://{path}{fragment}")
        deadline = time.monotonic() + 60
        while self.run("return document.documentElement.dataset.ready") != "yes":
            assert time.monotonic() < deadline, self.driver.get_log("browser")
            time.sleep(0.05)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def settled(self, script: str, wanted: Any) -> None:
        """Wait until ``script`` gives ``wanted``."""
        deadline = time.monotonic() + 20
        while (found := self.run(script)) != wanted:
            assert time.monotonic() < deadline, (found, wanted)
            time.sleep(0.05)

    def choose(self, name: str, values: list[str]) -> None:
        """Only these values of a filter."""
        filter_ = self.driver.find_element(By.CSS_SELECTOR, f".filter[data-name='{name}']")
        filter_.find_element(By.TAG_NAME, "summary").click()
        filter_.find_element(By.CLASS_NAME, "none").click()
        for value in values:
            filter_.find_element(By.CSS_SELECTOR, f"input[value='{value}']").click()
        filter_.find_element(By.TAG_NAME, "summary").click()


@pytest.fixture(scope="module")
def page(report: Path) -> Iterator[Page]:
    opened = Page(report / "index.html")
    yield opened
    opened.driver.quit()


@pytest.fixture
def changed(page: Page, report: Path) -> Iterator[None]:
    """For a test that leaves the page otherwise than it found it."""
    yield
    page.open(report / "index.html")


MARKS = (
    "[role='graphics-symbol'], [role='graphics-object'] path, .mark-rect path, .mark-symbol path"
)
FIGURES = """
return [...document.querySelectorAll('figure[data-figure]')].map((figure) => [
  figure.querySelector('h3').textContent,
  figure.dataset.drawn === 'yes',
  figure.querySelectorAll('svg [class*=mark-] path:not([d=""]), svg [class*=mark-] line').length,
]);
"""


def test_loads_without_errors_and_without_the_network(page: Page) -> None:
    assert page.driver.get_log("browser") == []
    asked = [
        json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")
    ]
    urls = {
        message["params"]["request"]["url"]
        for message in asked
        if message["method"] == "Network.requestWillBeSent"
    }
    assert {url.partition(":")[0] for url in urls} <= {"file", "data", "about", "blob"}
    assert sum(url.startswith("file:") for url in urls) == 1


def test_every_figure_has_content_and_files(page: Page, report: Path) -> None:
    figures = page.run(FIGURES)
    titles = {title.partition(" · ")[0] for title, _, _ in figures}
    assert len(titles) == 18
    for title, drawn, marks in figures:
        assert drawn, title
        assert marks >= 3, (title, marks)
    files = list((report / "figures").iterdir())
    assert len(files) == 2 * len(figures)
    for file in files:
        start = file.read_bytes()[:5]
        assert start in (b"\x89PNG\r", b"%PDF-"), file


def test_text_of_runs_is_text(page: Page) -> None:
    assert page.run("return window.broken === undefined")
    assert page.run("return document.querySelector('main img') === null")
    assert SCRIPT in page.driver.find_element(By.ID, "table-runs").get_attribute("textContent")
    heads = page.driver.find_elements(By.CSS_SELECTOR, "#findings h3")
    assert any("<script>" in head.get_attribute("textContent") for head in heads)
    for row in page.driver.find_elements(By.CSS_SELECTOR, "#table-runs tbody tr"):
        if "<script>" in row.get_attribute("textContent"):
            page.run("arguments[0].click()", row)
            shown = page.driver.find_element(By.ID, "run-content").get_attribute("textContent")
            assert "<script>" in shown
            page.run("document.getElementById('run').close()")
    assert page.run("return window.broken === undefined")


def test_means_in_the_figure_are_those_of_the_table(page: Page, report: Path) -> None:
    import pandas as pd

    cells = pd.read_csv(report / "tables" / "accuracy.csv")
    cells = cells[cells["dataset"] == "town"].set_index("method")["test"]
    labels = page.run(
        "return [...document.querySelector(\"figure[data-dataset='town']\")"
        ".querySelectorAll('[aria-roledescription=\"point\"]')].map((point) => point.ariaLabel)"
    )
    means = {}
    for label in labels:
        parts = dict(part.split(": ", 1) for part in label.split("; ") if ": " in part)
        if "mean" in parts:
            means[parts["method"]] = float(parts["mean"].rstrip("%")) / 100
    assert means.keys() == set(cells.index)
    for method, mean in means.items():
        assert mean == pytest.approx(cells[method], abs=1e-4)


def shown_rows(table: str) -> str:
    return (
        f"return [...document.querySelectorAll('#table-{table} tbody tr')]"
        ".filter((row) => row.checkVisibility()).length"
    )


TOWN = "document.querySelector(\"figure[data-dataset='town']\")"
POINTS = f"return {TOWN}.querySelectorAll('[aria-roledescription=\"point\"]').length"


@pytest.mark.usefixtures("changed")
def test_filters_act_on_figures_and_rows(page: Page) -> None:
    everything = page.run(POINTS)
    page.choose("loss", ["mdpo"])
    page.settled(POINTS, 7 * 2 + 7)  # seven methods: two seeds and a mean each
    assert everything > 7 * 3
    assert page.run(shown_rows("accuracy")) == 7 + 2 + 1
    page.choose("seed", ["0"])
    page.settled(POINTS, 7 + 7)
    page.choose("dataset", ["village"])
    page.settled(shown_rows("accuracy"), 2)
    assert not page.run(f"return {TOWN}.checkVisibility()")
    address = page.run("return location.hash")
    assert address.startswith("#filters=")
    page.driver.refresh()
    page.settled("return document.documentElement.dataset.ready", "yes")
    assert page.run(shown_rows("accuracy")) == 2  # a page that loads itself again stays as it was
    for name in ("loss", "seed", "dataset"):
        page.run(f"document.querySelector(\".filter[data-name='{name}'] .all\").click()")
    page.settled(POINTS, everything)
    assert page.driver.get_log("browser") == []


@pytest.mark.usefixtures("changed")
def test_click_on_a_point_shows_its_run(page: Page, report: Path) -> None:
    point = page.driver.find_element(
        By.CSS_SELECTOR, "figure[data-dataset='town'] [aria-label*='seed: 1']"
    )
    label = point.get_attribute("aria-label")
    page.run(
        "for (const type of ['pointerdown', 'mousedown', 'pointerup', 'mouseup', 'click'])"
        " arguments[0].dispatchEvent(new MouseEvent(type, {bubbles: true, view: window}))",
        point,
    )
    assert page.run("return document.getElementById('run').open")
    shown = page.driver.find_element(By.ID, "run-content").text
    run = label.split("run: ")[1]
    assert run in shown
    assert "seed 1" in shown


@pytest.mark.usefixtures("changed")
def test_tables_sort(page: Page) -> None:
    heads = page.driver.find_elements(By.CSS_SELECTOR, "#table-accuracy th")
    (column,) = (i for i, head in enumerate(heads) if head.get_attribute("textContent") == "test")
    script = (
        "return [...document.querySelectorAll('#table-accuracy tbody tr')]"
        f".map((row) => parseFloat(row.cells[{column}].textContent))"
    )
    page.run("arguments[0].querySelector('button').click()", heads[column])
    assert page.run(script) == sorted(page.run(script))
    page.run("arguments[0].querySelector('button').click()", heads[column])
    assert page.run(script) == sorted(page.run(script), reverse=True)
    assert heads[column].get_attribute("aria-sort") == "descending"


def test_running_and_failed_runs_are_told(page: Page) -> None:
    assert "step 7 of 20" in page.driver.find_element(By.CLASS_NAME, "progress").text
    counts = page.driver.find_element(By.CLASS_NAME, "meta").text
    for words in ("1 failed", "1 running", "1 unreadable"):
        assert words in counts


def luminance(page: Page, script: str) -> float:
    color = page.run(f"return getComputedStyle({script}).color")
    red, green, blue = (float(part) for part in color.removeprefix("rgb(").rstrip(")").split(","))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.usefixtures("changed")
def test_theme_follows_the_system_and_the_button(page: Page) -> None:
    text = "document.querySelector('figure svg text')"
    assert luminance(page, text) < 80
    page.driver.find_element(By.ID, "theme").click()
    assert luminance(page, text) > 180
    assert luminance(page, "document.body") > 180


@pytest.mark.usefixtures("changed")
@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_is_wider_than_the_window(page: Page, report: Path, width: int) -> None:
    page.driver.set_window_size(width, 900)
    try:
        page.open(report / "index.html")
        assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        page.driver.set_window_size(1280, 900)


def test_prints(page: Page) -> None:
    printed = page.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert len(printed["data"]) > 100_000
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        for place in ("nav", "#filters", "#theme"):
            assert not page.run(f"return document.querySelector('{place}').checkVisibility()")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_watch_loads_the_page_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round is cut short; the page asks to be loaded again."""
    make_run(tmp_path / "runs")
    written: list[float] = []

    def stop(seconds: float) -> None:
        written.append(seconds)
        if len(written) == 2:
            raise KeyboardInterrupt
        make_run(tmp_path / "runs", seed=1)

    monkeypatch.setattr(time, "sleep", stop)
    out = tmp_path / "report"
    assert main([str(tmp_path / "runs"), "--out", str(out), "--watch", "30"]) == 130
    html = (out / "index.html").read_text()
    assert '<meta http-equiv="refresh" content="30">' in html
    assert "2 finished" in html
