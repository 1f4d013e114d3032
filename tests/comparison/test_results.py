import csv
from pathlib import Path

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
    assert "| other | +0.100 ± 0.000" in text
    assert "| base | 250 |" in text


def test_csv_has_a_row_per_choice_and_seed(tmp_path: Path):
    paths = example().write(tmp_path)
    rows = list(csv.DictReader(paths[1].open()))
    assert [(row["choice"], row["seed"], row["val/mark"]) for row in rows][3] == ("other", "0", "0.6")
    assert len(rows) == 6


def test_json_reads_back_to_the_same_table(tmp_path: Path):
    paths = example().write(tmp_path)
    assert Results.read(paths[2]).markdown() == paths[0].read_text()


def test_plot_is_a_picture(tmp_path: Path):
    assert example().write(tmp_path)[3].read_bytes().startswith(b"\x89PNG")


def test_a_run_without_the_metric_leaves_a_dash():
    results = example()
    results.rows = [row for row in results.rows if row.choice == "base"]
    results.rows.append(Row("broken", 0, {}, {}, "runs/x", "cd"))
    assert "| broken | 1 | - |" in results.markdown()
