"""The page of a run and of several."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from run_folder_files import HOSTILE, write_run_files

from umm_zoo.errors import UserError
from umm_zoo.report.__main__ import main
from umm_zoo.report.callback import RunPage
from umm_zoo.report.curves import thinned
from umm_zoo.report.html import data, element, embedded, table
from umm_zoo.report.run_files import RunFiles
from umm_zoo.report.run_page import run_page, runs_page


class Elements(HTMLParser):
    """All elements with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def charts_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run_files(tmp_path / "toy")


def test_page_says_what_the_run_is(run: Path) -> None:
    words = Elements(run_page(RunFiles.read(run))).words
    for text in (
        "toy finished",
        "Painter: 40 of 40 steps in 2 min 05 s",
        "python -m umm_zoo.fit my.yaml",
        "abc1234",
        "paint",
        "Linear",
    ):
        assert text in words


def test_hostile_texts_are_shown_as_text(run: Path) -> None:
    page = run_page(RunFiles.read(run))
    elements = Elements(page)
    assert elements.words.count(HOSTILE) == 4  # the source, twice, the reason of a skip, the experiment
    assert len(elements.of("script")) == 2 and not any("onerror" in attributes for _, attributes in elements.found)
    assert "</script><script>" not in data({"x": "</script><script>"}, "charts")


def test_page_loads_nothing_from_elsewhere(run: Path) -> None:
    elements = Elements(run_page(RunFiles.read(run)))
    places = [value for _, attributes in elements.found for key, value in attributes.items() if key in ("src", "href")]
    assert places and all(str(value).startswith("data:image/") for value in places)
    assert any("default-src 'none'" in str(meta.get("content")) for meta in elements.of("meta"))


def test_curves_have_a_chart_per_loss_and_one_per_metric(run: Path) -> None:
    charts = {chart["title"]: chart["series"] for chart in charts_of(run_page(RunFiles.read(run)))}
    assert list(charts) == ["train/loss", "val/accuracy", "val/image"]  # what is read against stands in the table
    assert charts["train/loss"][0]["points"][:2] == [[2, 1.1], [4, 0.43333]]
    assert charts["val/accuracy"] == [
        {"name": "colour", "points": [[20, 0.125], [40, 0.375]]},
        {"name": "overall", "points": [[20, 0.25], [40, 0.75]]},
    ]


def test_thinned_curves_keep_their_extremes_and_their_end() -> None:
    curve = [(step, float(step % 7)) for step in range(1, 3001)]
    curve[1234] = (1235, 90.0)
    curve[2001] = (2002, -90.0)
    points = thinned(curve, 100)
    assert len(points) <= 100 and [1235, 90.0] in points and [2002, -90.0] in points and points[-1] == [3000, 4.0]
    assert points == sorted(points) and thinned([(1, float("inf")), (2, float("nan")), (3, 1.0)]) == [[3, 1.0]]


def test_scores_are_read_against_ceiling_and_prior(run: Path) -> None:
    files = RunFiles.read(run)
    found = {name: files.reference(name) for name in files.scores}
    said = {name: (reference.name, reference.value) for name, reference in found.items() if reference}
    assert said == {"val/accuracy/overall": ("prior", 0.5), "val/image/psnr": ("ceiling", 33.5)}


def test_slider_has_every_grid_and_shows_the_last(run: Path) -> None:
    elements = Elements(run_page(RunFiles.read(run)))
    assert [image["alt"] for image in elements.of("img")] == ["step 20", "step 40"]
    [slider] = elements.of("input")
    assert (slider["max"], slider["value"]) == ("1", "1")


def test_grids_beyond_the_room_of_a_page_are_left_out_and_counted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umm_zoo.report.run_page.GRIDS", 1)
    elements = Elements(run_page(RunFiles.read(run)))
    assert [image["alt"] for image in elements.of("img")] == ["step 40"] and "1 more in" in elements.words


def test_a_run_without_its_scores_is_running_or_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run_files(tmp_path / "toy", finished=False)
    assert RunFiles.read(run).state == "stopped" and RunFiles.read(run).scores["val/accuracy/overall"] == 0.75
    monkeypatch.setattr("umm_zoo.report.run_files.in_progress", lambda folder: folder == run)
    assert RunFiles.read(run).state == "running" and "toy running" in Elements(run_page(RunFiles.read(run))).words


@pytest.mark.parametrize(
    "file, content",
    [
        ("metrics.json", '{"steps": "x", "metrics": {"val/a": "NaN"}, "machine": "m", "costs": [1], "seconds": "a"}'),
        ("metrics.json", '{"metrics": 3, "versions": [1]}'),
        ("report.json", '{"parts": [1, {"name": "paint"}], "machine": [1]}'),
        ("data.json", '{"train": {"a": 3, "b": {"skips": 3}}, "val": [1]}'),
        ("history.json", '[{}, {"changed": 3}]'),
        ("experiment.yaml", "name: toy\nmethod: null\nmetrics: 3\n"),
        ("samples/step-000040.png", "no image"),
    ],
)
def test_a_damaged_file_leaves_only_its_part_empty(run: Path, file: str, content: str) -> None:
    (run / file).write_text(content)
    files = RunFiles.read(run)
    words = Elements(run_page(files)).words
    assert "toy finished" in words and "train/loss" in run_page(files)
    assert "toy" in runs_page([files, files])


def test_no_image_that_is_sound_leaves_no_slider(run: Path) -> None:
    for image in (run / "samples").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    elements = Elements(run_page(RunFiles.read(run)))
    assert not elements.of("img") and not elements.of("input") and "2 more in" in elements.words


def test_a_page_that_cannot_be_made_is_told_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> Path:
        raise ZeroDivisionError("no page")

    monkeypatch.setattr("umm_zoo.report.callback.write_run_page", fail)
    experiment: Any = None
    trainer: Any = SimpleNamespace(is_global_zero=True, sanity_checking=False, state=SimpleNamespace(fn=TrainerFn.FITTING))
    RunPage(experiment, tmp_path).on_validation_end(trainer, LightningModule())
    assert "no page was written: ZeroDivisionError: no page" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "[", "{}", "[1]"])
def test_what_is_no_record_of_a_comparison_is_one_line(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "uae.json"
    if content is not None:
        file.write_text(content)
    assert main([str(file)]) == 2
    assert "uae.json: found no record of a comparison" in capsys.readouterr().err


def test_several_runs_differ_where_their_experiments_do(tmp_path: Path) -> None:
    runs = [RunFiles.read(write_run_files(tmp_path / name, name, lr)) for name, lr in (("one", 0.1), ("two", 0.2))]
    page = runs_page(runs)
    assert "training.optimizer.lr0.10.2" in Elements(page).words and "method.prompt" not in Elements(page).words.split("Scores")[0]
    [loss] = [chart for chart in charts_of(page) if chart["title"] == "train/loss"]
    assert [(own["name"], own["points"][0]) for own in loss["series"]] == [("one", [2, 1.1]), ("two", [2, 1.2])]


def test_small_images_are_enlarged_whole_and_large_ones_shrunk(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    Image.new("RGB", (5, 4), "red").save(tmp_path / "small.png")
    Image.new("RGB", (90, 30), "red").save(tmp_path / "large.png")
    sizes = []
    for name in ("small", "large"):
        _, _, stored = embedded(tmp_path / f"{name}.png", 60, 16).partition(",")
        sizes.append(Image.open(io.BytesIO(base64.b64decode(stored))).size)
    assert sizes == [(15, 12), (60, 20)]


def test_elements_escape_attributes_and_end_where_they_should() -> None:
    assert element("img", alt='a"<b>', src=None) == '<img alt="a&quot;&lt;b&gt;">'
    assert element("p", "1 < 2", class_="x", data_copy="y") == '<p class="x" data-copy="y">1 &lt; 2</p>'
    assert table([["a", 1234, 0.12345, None]]).count("<td") == 4 and "1,234" in table([[1234]]) and "0.1235" in table([[0.12345]])


def test_command_writes_the_page_into_the_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run}/report.html (0.0")
    assert "toy" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{}"], "error: {}: found no experiment.yaml of a run, expected a run folder, such as runs/llava/shapes\n"),
        (["{}", "{}"], "error: --out: found nothing, expected the file to write, for a page of several runs\n"),
        (
            ["x.json", "{}"],
            "error: x.json: found a comparison beside other sources, expected one comparison by itself, or run folders\n",
        ),
    ],
)
def test_what_is_no_run_is_said_in_one_line(
    tmp_path: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([text.format(tmp_path) for text in arguments]) == 2
    assert capsys.readouterr().err == line.format(tmp_path)


def test_what_is_no_run_raises(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("- a list\n")
    with pytest.raises(UserError):
        RunFiles.read(tmp_path)
