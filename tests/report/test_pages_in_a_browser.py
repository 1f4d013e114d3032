"""The pages in Chromium: curves, slider, full size, copying. Skipped where Playwright or Chromium is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folder_files import write_run_files

from umm_zoo.report.run_files import RunFiles
from umm_zoo.report.run_page import run_page, runs_page

playwright: Any = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"), pytest.mark.processes]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    file = tmp_path / "page.html"
    file.write_text(run_page(RunFiles.read(write_run_files(tmp_path / "toy"))))
    opened = browser.new_page(viewport={"width": 1000, "height": 900})
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    opened.goto(file.as_uri())
    yield opened
    assert faults == []
    opened.close()


def test_slider_shows_one_grid_at_a_time(page: Any) -> None:
    assert page.locator(".samples img:visible").evaluate_all("all => all.map(i => i.alt)") == ["step 40"]
    page.locator(".samples input").fill("0")
    assert page.locator(".samples img:visible").evaluate_all("all => all.map(i => i.alt)") == ["step 20"]
    assert page.locator(".samples output").inner_text() == "step 20"


def test_click_shows_a_grid_at_full_size(page: Any) -> None:
    page.locator(".samples img:visible").click()
    assert page.locator("dialog img").evaluate("i => [i.alt, i.naturalWidth]") == ["step 40", 300]
    page.locator("dialog img").click()
    assert page.locator("dialog[open]").count() == 0


def test_hovering_says_the_values_of_the_nearest_step(page: Any) -> None:
    chart = page.locator("[data-chart='1'] svg")
    box = chart.bounding_box()
    chart.hover(position={"x": box["width"] - 14, "y": 40})
    assert page.locator("[data-chart='1'] .tip").inner_text().split("\n") == ["step 40", "colour: 0.375", "overall: 0.75"]


def test_dragging_zooms_and_a_double_click_comes_back(page: Any) -> None:
    chart = page.locator("[data-chart='0'] svg")
    count = "svg => svg.querySelectorAll('circle').length"
    assert chart.evaluate(count) == 20
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + 60)
    page.mouse.up()
    assert 8 <= chart.evaluate(count) <= 11
    chart.dblclick()
    assert chart.evaluate(count) == 20


def test_log_scale_and_hidden_curves(page: Any) -> None:
    place = page.locator("[data-chart='1']")
    before = place.locator("svg").evaluate("svg => [...svg.querySelectorAll('text')].map(t => t.textContent)")
    place.locator("header button").click()
    assert place.locator("svg").evaluate("svg => [...svg.querySelectorAll('text')].map(t => t.textContent)") != before
    place.locator(".legend button", has_text="colour").click()
    assert place.locator("polyline").count() == 1


def test_copy_takes_the_command(page: Any) -> None:
    page.evaluate("document.execCommand = () => { window.copied = document.activeElement.value; return true; }")
    page.locator("[data-copy]").first.click()
    assert page.evaluate("window.copied") == "python -m umm_zoo.fit my.yaml"


def test_hostile_texts_run_nothing_and_the_page_is_fast(page: Any) -> None:
    assert page.title() == "toy"
    assert page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart") < 5000  # a busy machine; idle: 100


@pytest.mark.parametrize("width", [400, 1400])
def test_no_page_is_wider_than_its_window(browser: Any, tmp_path: Path, width: int) -> None:
    runs = [RunFiles.read(write_run_files(tmp_path / name, name, lr)) for name, lr in (("one", 0.1), ("two", 0.2))]
    opened = browser.new_page(viewport={"width": width, "height": 800})
    for text in (run_page(runs[0]), runs_page(runs)):
        opened.set_content(text)
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.close()
