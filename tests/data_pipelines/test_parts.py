"""Parts of a job are disjoint and complete, and leave together what one process leaves, byte for byte, even after a kill."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import test_rows_add_up
from converter_parts import convert, error_of, photo
from test_precompute import options
from test_shards import write_world

from data_pipelines import index as index_command
from data_pipelines.command import Portion
from data_pipelines.converters import blip3o, llava_json
from data_pipelines.precompute import main as precompute

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "that"}]


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".partial"
    }


def list_of(folder: Path, rows: int = 11) -> Path:
    """A list of rows, of which that of number 4 is left out."""
    folder.mkdir()
    for number in range(rows):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    names = [f"{number}.jpg" if number != 4 else "gone.jpg" for number in range(rows)]
    (folder / "list.json").write_text(json.dumps([{"image": name, "conversations": TURNS} for name in names]))
    return folder / "list.json"


@pytest.mark.parametrize("items", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_item_is_of_exactly_one_part(items, count):
    parts = [Portion(number, count).of(range(items)) for number in range(1, count + 1)]
    assert [item for part in parts for item in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("name", test_rows_add_up.CASES)
def test_three_parts_in_any_order_leave_what_one_process_leaves(tmp_path, monkeypatch, name):
    compared = []

    def in_parts(command: Any, source: Path, out: Path, *options: object) -> dict[str, Any]:
        small = [f"--{name}" for name in re.findall(r"--(\w+-per-shard)", command.parser().format_help())[:1]]
        options = (*options, *(word for option in small for word in (option, 2)))
        whole = convert(command, source, out, *options)
        expected = files_in(out)
        shutil.rmtree(out)
        for part in ("2/3", "1/3", "3/3"):
            assert not (out / "report.json").exists()
            convert(command, source, out, *options, "--part", part)
        assert files_in(out) == expected
        compared.append(expected)
        return whole

    monkeypatch.setattr(test_rows_add_up, "convert", in_parts)
    test_rows_add_up.CASES[name](tmp_path)
    assert len(compared[0]) > 3


def test_a_part_says_what_is_not_written_yet_and_is_no_conversion_of_other_arguments(tmp_path, capsys):
    source, out = list_of(tmp_path / "in"), tmp_path / "out"
    convert(llava_json, source, out, "--rows-per-shard", 2, "--part", "2/3")
    assert "4 of 6 shards are not written yet, such as train/conversations-000000" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["conversion-2-of-3.json", "train"]
    assert "holds a conversion of other arguments" in error_of(llava_json, [source, out, "--part", "1/3"], capsys)
    line = error_of(llava_json, [source, out, "--rows-per-shard", 2, "--part", "1/3", "--overwrite"], capsys)
    assert "--overwrite: found together with --part 1/3" in line


def test_one_process_and_another_number_of_parts_go_on_with_what_is_there(tmp_path):
    source, out, size = list_of(tmp_path / "in"), tmp_path / "out", ("--rows-per-shard", 2)
    expected = convert(llava_json, source, tmp_path / "whole", *size)
    convert(llava_json, source, out, *size, "--part", "2/3")
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    convert(llava_json, source, out, *size, "--part", "4/4")
    assert convert(llava_json, source, out, *size) == expected and files_in(out) == files_in(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_part_that_writes_again_what_was_left_out_is_in_the_report(tmp_path):
    source, out, size = list_of(tmp_path / "in"), tmp_path / "out", ("--rows-per-shard", 2)
    assert convert(llava_json, source, out, *size)["left_out"] == 1
    (source.parent / "gone.jpg").write_bytes(photo(77))
    for part in ("1/3", "2/3", "3/3"):
        report = convert(llava_json, source, out, *size, "--part", part, "--retry")
    assert report["left_out"] == 0 and report["samples"] == {"train/conversations": 11}
    assert json.loads((out / "conversion.json").read_text())["shards"]["train/conversations-000002"]["samples"] == 2


def test_where_no_row_can_be_used_the_last_part_says_so(tmp_path, capsys):
    rows = [{"image": "gone.jpg", "conversations": TURNS}] * 4
    (tmp_path / "list.json").write_text(json.dumps(rows))
    arguments = [tmp_path / "list.json", tmp_path / "out", "--rows-per-shard", 2, "--part"]
    convert(llava_json, *arguments, "1/2")
    assert "nothing could be converted; the first reason: row 0: missing image" in error_of(llava_json, [*arguments, "2/2"], capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/2/3", "-1/3", "a/b", "1/0", ""])
def test_no_part_is_a_user_error(tmp_path, capsys, part):
    assert "expected K/N with K from 1 to N" in error_of(llava_json, ["list.json", "out", f"--part={part}"], capsys)


@pytest.mark.processes
def test_parts_at_once_of_which_one_is_killed_and_started_again(tmp_path):
    source, out = list_of(tmp_path / "in", 240), tmp_path / "out"
    size = ["--rows-per-shard", "4"]
    convert(llava_json, source, tmp_path / "whole", *size)
    fork = multiprocessing.get_context("fork")
    arguments = [(llava_json, source, out, *size, "--part", f"{number}/3") for number in (1, 2, 3)]
    parts = [fork.Process(target=convert, args=given) for given in arguments]
    for part in parts:
        part.start()
    first, deadline = out / "train/conversations-000022.tar", time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline and parts[1].is_alive():
        time.sleep(0.001)
    parts[1].kill()
    for part in parts:
        part.join(60)
    assert [part.exitcode for part in parts] == [0, -signal.SIGKILL, 0] and not (out / "report.json").exists()
    convert(*arguments[1])
    assert files_in(out) == files_in(tmp_path / "whole")


def test_tars_are_indexed_in_parts(tmp_path, capsys):
    world = write_world(tmp_path / "world", [2, 3, 1, 2])
    for path in world.glob("*.json"):
        path.unlink()
    for part in ("1/3", "2/3", "3/3"):
        convert_index(world, part)
    assert len(list(world.glob("*.tar.index.json"))) == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if "samples" in line]
    assert len(lines) == len(set(lines)) == 4


def convert_index(world: Path, part: str) -> None:
    index_command.main(index_command.parser().parse_args([str(world), "--part", part]))


def test_pairs_are_indexed_in_place_in_parts(tmp_path, capsys):
    world = write_world(tmp_path / "world", [2, 3, 1])
    for part in ("1/2", "2/2"):
        blip3o.main(blip3o.parser().parse_args([str(world), "--in-place", "--part", part]))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "tars indexed" in line] == ["1", "2"]


def test_outputs_are_stored_in_parts(tmp_path, capsys):
    world = write_world(tmp_path / "world", [3, 4, 2, 1])
    assert precompute(options(world)) == 0
    (stored,) = (world / "precomputed").iterdir()
    whole = files_in(stored)
    shutil.rmtree(stored)
    capsys.readouterr()
    for part in ("3/3", "1/3", "2/3"):
        assert precompute([*options(world), "--part", part]) == 0
    printed = capsys.readouterr().out
    assert files_in(stored) == whole and len(whole) == 8
    assert "(part 3/3 of 4 shards): 3 samples" in printed and "times as fast" not in printed
