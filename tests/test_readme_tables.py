"""Result tables of the README: none is older than the file it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.update_readme import MARK, ROOT, filled, main
from umm_zoo.comparison.results import Results, Row

EMPTY = "# Title\n\n<!-- results: results/demo.json -->\n<!-- end results -->\nafter\n"


def write_results(root: Path, second: float = 0.75) -> None:
    rows = [
        Row(choice, seed, {"val/mark": value + seed / 10}, {}, run=f"runs/{choice}", experiment="ab")
        for choice, value in (("plain", 0.5), ("new", second))
        for seed in (0, 1)
    ]
    Results("demo", "Does it help?", "demo.yaml", {"mark": ("val/mark", True)}, rows, {"commit": "abc"}).write(root / "results")


def test_tables_in_the_repository_are_what_the_tool_would_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_every_result_of_the_repository_reads_and_names_a_compare_file_that_is_there() -> None:
    for path in ROOT.glob("experiments/compare/results/*.json"):
        source = ROOT / Results.read(path).source
        assert source.is_file(), f"{path}: was made from {source}, which does not exist"


def test_block_is_filled_and_filling_again_changes_nothing(tmp_path: Path) -> None:
    write_results(tmp_path)
    (tmp_path / "README.md").write_text(EMPTY)
    assert main(["--check"], tmp_path) == 1 and (tmp_path / "README.md").read_text() == EMPTY
    assert main([], tmp_path) == 0 and main(["--check"], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- results: results/demo.json -->\n\nDoes it help?\n") and text.endswith("\nafter\n")
    assert "| new | +0.250 ± " in text and "](results/demo.png)" in text and "# demo" not in text
    assert filled(text, tmp_path) == text


def test_a_readme_of_an_experiment_is_filled_with_the_plot_as_seen_from_there(tmp_path: Path) -> None:
    write_results(tmp_path)
    (tmp_path / "README.md").write_text("# Front page\n")
    room = tmp_path / "experiments" / "demo" / "README.md"
    room.parent.mkdir(parents=True)
    room.write_text(EMPTY)
    assert main([], tmp_path) == 0 and "](../../results/demo.png)" in room.read_text()


def test_new_results_make_the_old_table_stale(tmp_path: Path) -> None:
    write_results(tmp_path)
    (tmp_path / "README.md").write_text(filled(EMPTY, tmp_path))
    write_results(tmp_path, second=0.875)
    assert main(["--check"], tmp_path) == 1


def test_two_blocks_keep_what_stands_between_them(tmp_path: Path) -> None:
    write_results(tmp_path)
    text = filled(EMPTY + "between\n" + EMPTY, tmp_path)
    assert text.count("Does it help?") == 2 and "after\nbetween\n" in text and len(MARK.findall(text)) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (EMPTY.replace("<!-- end results -->", ""), "found no '<!-- end results -->' behind the block of results/demo.json"),
        (EMPTY.replace("<!-- end results -->\n", "") + EMPTY, "inside the block of results/demo.json"),
        ("<!-- end results -->\n", "outside any"),
        (EMPTY.replace("demo", "absent"), "absent.json"),
    ],
)
def test_blocks_that_cannot_be_filled_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    write_results(tmp_path)
    (tmp_path / "README.md").write_text(text)
    assert main([], tmp_path) == 2 and (tmp_path / "README.md").read_text() == text
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_table_follows_the_rows_and_not_a_stored_text(tmp_path: Path) -> None:
    write_results(tmp_path)
    path = tmp_path / "results" / "demo.json"
    record = json.loads(path.read_text())
    record["rows"][0]["metrics"]["val/mark"] = 0.0
    path.write_text(json.dumps(record))
    assert "| plain | 2 | 0.300 ± " in filled(EMPTY, tmp_path)
