"""What all converters share where the machine is in the way: a full disk, a terminal that is not UTF-8, a parser that breaks."""

from __future__ import annotations

import io
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from converter_parts import convert, error_of, samples_in
from PIL import Image

from data_pipelines.command import run
from data_pipelines.converters import llava_json
from data_pipelines.converters.converting import Noted, Part, converter_parser
from data_pipelines.converters.converting import convert as convert_parts
from data_pipelines.decoding import BadSampleError

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "that"}]


def noise(folder: Path, rows: int = 12) -> Path:
    """A list of rows with an image of 3 kB each."""
    folder.mkdir(parents=True)
    for number in range(rows):
        Image.effect_noise((32, 32), 90).convert("RGB").save(folder / f"{number}.png")
    (folder / "list.json").write_text(json.dumps([{"image": f"{n}.png", "conversations": TURNS} for n in range(rows)]))
    return folder / "list.json"


@pytest.mark.parametrize("room", [0, 2_000, 20_000])  # of the notes on the conversation, the tar, its index
def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path, capsys, room):
    source, out = noise(tmp_path / "in"), tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        line = error_of(llava_json, [source, out, "--rows-per-shard", 4], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.startswith(f"error: {out}/") and "File too large" in line
    assert not [path for path in out.rglob("*") if path.suffix in (".partial", ".tmp")]
    assert convert(llava_json, source, out, "--rows-per-shard", 4)["samples"] == {"train/conversations": 12}


def test_output_that_is_not_utf_8_gets_escapes(tmp_path, monkeypatch):
    source = noise(tmp_path / "in", 1)
    (tmp_path / "in/list.json").write_text(
        json.dumps([*json.loads(source.read_text()), {"image": "naïve.png", "conversations": TURNS}])
    )
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    assert run(llava_json.main, llava_json.parser().parse_args([str(source), str(tmp_path / "caf\u00e9 \u732b")])) == 0
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert r"missing image: na\xefve.png" in printed and "report.json" in printed


def items(out: Path, make: Any, **part: Any) -> dict[str, Any]:
    """The report of a conversion of the items 0 to 3."""
    arguments = converter_parser("``python -m x``: x", "x").parse_args(["in", str(out)])
    convert_parts(arguments, [Part("train/x", range(4), make, "row {}".format, **part)])
    return json.loads((out / "report.json").read_text())


def sample(item: int, text: str = "text", **row: Any) -> dict[str, Any]:
    return {"__key__": str(item) + text[:1], "json": {"conversations": [{"role": "user", "text": text}], **row}}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadSampleError("bad: very"), "bad"),
        (TypeError("unhashable"), "row cannot be converted"),
        (RecursionError("deep"), "row cannot be converted"),
        (OverflowError("large"), "row cannot be converted"),
        (MemoryError(), "row cannot be converted"),
    ],
)
def test_whatever_a_row_raises_costs_that_row_alone(tmp_path, error, reason):
    def make(item: int) -> Iterator[Any]:
        yield Noted("seen")
        yield sample(item, "a")
        if item == 2:
            raise error
        yield sample(item, "b")

    report = items(tmp_path / "out", make)
    assert (report["rows"], report["converted"], report["samples"]) == ({"train/x": 4}, {"train/x": 3}, {"train/x": 6})
    assert report["reasons"] == {reason: 1} and list(report["left_out_items"]) == ["row 2"]
    assert {row["key"] for row in samples_in(tmp_path / "out/train/*.tar")} == {
        f"{n}{letter}" for n in (0, 1, 3) for letter in "ab"
    }


@pytest.mark.parametrize("bad", ["\ud800", float("nan"), float("inf")])
@pytest.mark.parametrize("holds_rows", [False, True])
def test_what_cannot_be_written_is_left_out_by_name(tmp_path, bad, holds_rows):
    report = items(tmp_path / "out", lambda item: [sample(item, note=bad if item == 1 else "good")], holds_rows=holds_rows)
    assert report["converted"] == {"train/x": 3} and report["left_out"] == 1
    assert next(iter(report["left_out_items"])).startswith("row 1")


def test_a_row_of_which_nothing_comes_is_counted(tmp_path):
    report = items(tmp_path / "out", lambda item: [sample(item)] if item else [Noted("empty")])
    assert report["left_out_items"] == {"row 0": "nothing to convert in it"} and report["notes"] == {"empty": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"role": "user", "text": "<image>\nWhat?"}]}, "1 <image> markers in the user's turns, 0 images"),
        ({"conversations": [{"role": "system", "text": "<image>"}]}, "<image> in a system turn; images belong to the user's turns"),
        ({"conversations": [{"role": "cat", "text": "meow"}]}, "a turn has the role 'cat', expected user, assistant, system"),
    ],
)
def test_what_the_loader_would_refuse_is_not_written(tmp_path, row, reason):
    report = items(tmp_path / "out", lambda item: [{"__key__": str(item), "json": row} if item else sample(item)])
    assert report["converted"] == {"train/x": 1} and report["reasons"] == {reason: 3}


def test_long_texts_are_counted_as_the_loader_counts_them(tmp_path):
    report = items(tmp_path / "out", lambda item: [sample(item, note="x" * 65_400 * item)])
    assert report["notes"] == {"text of over 65,536 characters (needs a higher max_characters)": 2}
