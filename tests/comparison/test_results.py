import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from umm_zoo.comparison.results import Results, Row


def example() -> Results:
    values = {"base": {0: 0.5, 1: 0.6, 2: 0.7}, "other": {0: 0.6, 1: 0.7, 2: 0.8}}
    rows = [
        Row(choice, seed, {"val/mark": value}, {"seconds_per_step": 0.25}, run=f"runs/{choice}-{seed}", experiment="ab")
        for choice, of_seed in values.items()
        for seed, value in of_seed.items()
    ]
    return Results("demo", "Does it help?", "demo.yaml", {"mark": ("val/mark", True)}, rows, {"commit": "abc"})


def test_table_states_mean_and_paired_difference():
    text = example().markdown()
    assert "| base | 3 | 0.600 ± 0.248 |" in text  # t(.975, 2) * 0.1 / sqrt(3)
    assert "| other | +0.100 ± 0.000" in text  # rounding alone spreads the three differences
    assert "| base | 250 |" in text


def test_all_files_are_written_from_the_same_rows(tmp_path: Path):
    markdown, table, record, plot, _ = example().write(tmp_path)
    rows = list(csv.DictReader(table.open()))
    assert [(row["choice"], row["seed"], row["val/mark"]) for row in rows][3] == ("other", "0", "0.6") and len(rows) == 6
    assert Results.read(record).markdown() == markdown.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_the_metric_leaves_a_dash():
    results = example()
    results.rows = [row for row in results.rows if row.choice == "base"]
    results.rows.append(Row("broken", 0, {}, {}, "runs/x", "cd"))
    assert "| broken | 1 | - |" in results.markdown()


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_seed_whose_metric_counted_no_row_is_named_and_left_out_of_the_mean(nothing, tmp_path: Path):
    results = example()
    for choice, values in (("some", (0.5, nothing)), ("none", (nothing, nothing))):
        results.rows += [Row(choice, seed, {"val/mark": value}, {}, "runs/x", "cd") for seed, value in enumerate(values)]
    text = results.markdown()
    assert "| some | 2 | 0.5" in text and "(no row counted at seed 1) |" in text
    assert "| none | 2 | nan (no row counted at seed 0, 1) |" in text
    results.write(tmp_path)


def test_contrasts_are_differences_between_the_named_choices(tmp_path: Path):
    results = example()
    for seed, value in enumerate((0.9, 1.0, 1.4)):
        results.rows.append(Row("third", seed, {"val/mark": value}, {}, "runs/x", "cd"))
    results.contrasts = [("third", "other"), ("third", "never run"), ("third", "base")]
    text = results.markdown()
    (row,) = [line for line in text.splitlines() if line.startswith("| third - ")]
    # differences 0.3, 0.3, 0.6: mean 0.4, standard error 0.1, t(.975, 2) = 4.3027; to base: t = 5, p = 1 - 5 / sqrt(27) = 0.0377.
    # The own p is 1 - 4 / sqrt(18) = 0.0572, but Holm lets none fall below twice the next smaller one
    assert row == "| third - other | +0.400 ± 0.430 (t 4.0, p 0.075) |"
    assert Results.read(results.write(tmp_path)[2]).markdown() == text


def test_a_metric_that_is_better_in_neither_direction_is_read_back_so(tmp_path):
    results = example()
    results.metrics = {"mark": ("val/mark", None)}
    assert Results.read(results.write(tmp_path)[2]).metrics == results.metrics
    assert (results.title("mark"), replace(results, metrics={"mark": ("val/mark", False)}).title("mark")) == ("mark", "mark ↓")


@pytest.mark.parametrize(
    ("of_other", "higher", "word"),
    [
        ((0.6, 0.72, 0.8), True, "better"),  # +.1, +.12, +.1: t 16
        ((0.6, 0.72, 0.8), False, "worse"),
        ((0.6, 0.72, 0.8), None, "higher"),
        ((0.3, 0.9, 0.9), True, "not resolved"),
        ((0.9,), True, "one seed"),
        ((), True, "-"),
    ],
)
def test_differences_in_words(of_other: tuple[float, ...], higher: bool | None, word: str):
    results = example()
    results.metrics = {"mark": ("val/mark", higher)}
    results.rows = [row for row in results.rows if row.choice == "base"]
    results.rows += [Row("other", seed, {"val/mark": value}, {}, "runs/x", "cd") for seed, value in enumerate(of_other)]
    results.rows += [] if of_other else [Row("other", 0, {}, {}, "runs/x", "cd")]
    assert results.verdict_table() == (["", "mark"], [["other against base", word]])
