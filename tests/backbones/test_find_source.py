from pathlib import Path

import pytest

from umm_zoo.backbones.loading import find_source

PART = "experiments/tiny/weights/tower"


def test_a_shipped_part_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_source(PART), "config.json").is_file()
    assert find_source("organisation/name") == "organisation/name"  # a public name stays one


def test_a_folder_below_the_current_one_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / PART).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_source(PART) == PART
