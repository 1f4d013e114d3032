"""The page of a comparison."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from umm_zoo.comparison.page import comparison_page
from umm_zoo.comparison.results import Results, Row, Unfinished
from umm_zoo.report.__main__ import write

HOSTILE = "<b onclick=alert(1)>choice</b>"


def results() -> Results:
    rows = [
        Row(choice, seed, {"val/psnr": value}, {"parameters": 2e6}, f"compare/x/{seed}", "x.yaml")
        for choice, values in (("plain", (20.0, 22.0)), (HOSTILE, (23.0, 25.0)))
        for seed, value in enumerate(values)
    ]
    metrics = {"dB": ("val/psnr", True), "loss": ("val/loss", False)}
    return Results(
        "x",
        "Which?",
        "x.yaml",
        metrics,
        rows,
        {"command": "python -m …"},
        "The better.",
        [],
        [Unfinished("plain", 2, "out of memory")],
    )


def test_page_has_question_rule_intervals_and_differences() -> None:
    page = comparison_page(results())
    words = " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())
    for text in ("Which?", "The better.", "21.000 ± 12.706", "+3.000 ± 0.000", "failed: out of memory", "total M"):
        assert text in words


def test_plot_lays_means_on_one_axis() -> None:
    page = comparison_page(results())
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', page)]
    low, high = 21 - 12.7062 - 0.05 * 27.4124, 24 + 12.7062 + 0.05 * 28.4124
    assert len(places) == 2 and places[0] < places[1]
    assert abs((places[1] - places[0]) / 330 - 3 / (high - low)) < 1e-2


def test_names_of_choices_are_text() -> None:
    assert "<b onclick" not in comparison_page(results())


def test_samples_are_those_of_the_runs_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    run = tmp_path / "compare/x/0"
    (run / "samples").mkdir(parents=True)
    (run / "experiment.yaml").write_text("name: x\nmethod: {_target_: a.B}\n")
    Image.new("RGB", (40, 8)).save(run / "samples/step-000002.png")
    assert comparison_page(results(), tmp_path).count("<img") == 2 and "<img" not in comparison_page(results())
    monkeypatch.setenv("UMM_ZOO_RUNS", str(tmp_path))
    record = results().write(tmp_path / "results")[2]
    assert write([str(record)]).read_text().count("<img") == 2


def test_table_for_latex_has_intervals_numbers_of_seeds_and_nothing_that_it_would_obey() -> None:
    found = results()
    found.metrics = {"dB_1 & more": ("val/psnr", True)}
    assert found.latex().splitlines()[1:] == [
        r"\begin{tabular}{lrc}",
        r"\toprule",
        r"choice & $n$ & dB\_1 \& more \\",
        r"\midrule",
        r"plain & 2, 1 failed & 21.000 $\pm$ 12.706 \\",
        r"<b onclick=alert(1)>choice</b> & 2 & 24.000 $\pm$ 12.706 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
