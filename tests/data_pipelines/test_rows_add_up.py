"""Every row of a source ends as samples or as a counted, named reason: one claim, held for every converter and many bad rows."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converter_parts import convert, parquet_of, photo, read_tar
from test_shards import add

from data_pipelines.converters import blip3o, coco, editing, image_folder, img2dataset, llava_json, table
from data_pipelines.converters.report import count_rows, entry_of
from data_pipelines.tasks import Conversations

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "that"}]
EDIT = {"input": "a.jpg", "instruction": "Do.", "output": "a.jpg"}
#: Texts of rows that no parser takes, or that hold what cannot be written; a row around them, of which each is one field.
BAD = {
    "digits": "9" * 5000,
    "deep": "[" * 50_000 + "]" * 50_000,
    "surrogate": '"\\ud800"',
    "twice": '{"a": 1, "a": 2}',
}


def rows_text(good: dict[str, Any], field: str) -> list[str]:
    """A good row, a bad one for each of `BAD`, one that is not UTF-8 (written as Latin-1), one that is no object, a good one."""
    text = json.dumps(good)
    bad = [f'{text[:-1]}, "{field}": {value}}}' for value in BAD.values()]
    return [text, *bad, f'{text[:-1]}, "{field}": "caf\xe9"}}', "7", text]


def write_list(path: Path, rows: list[str], is_list: bool) -> None:
    text = "[" + ",\r\n".join(rows) + "]" if is_list else "\r\n\r\n".join(rows) + "\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("latin-1"))


def write_tars(folder: Path) -> None:
    """Unsorted, with names that hold dots or bytes of no UTF-8, differ by case, come twice, or belong to no pair."""
    folder.mkdir()
    names = ["a.1", "a.2", "b", "B", "caf\udce9", "nul"]
    with tarfile.open(folder / "0.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for place, name in enumerate(names):
            add(tar, f"{name}.jpg", photo(place))
        for name in reversed(names):
            add(tar, f"{name}.txt", b"a\0b" if name == "nul" else f"text of {name}".encode(errors="replace"))
        for name in ("b.jpg", "two.jpg", "two.JPG", "two.png", "._b.jpg", "__MACOSX/b.jpg", "README"):
            add(tar, name, photo(9))
        add(tar, "two.txt", b"which?")
        add(tar, "alone.txt", b"no image")
        add(tar, "deep.json", b"[" * 50_000)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "b.jpg"
        tar.addfile(link)


def run_llava(folder: Path, is_list: bool = True) -> tuple[dict[str, Any], int]:
    (folder / "a.jpg").write_bytes(photo())
    rows = rows_text({"image": "a.jpg", "conversations": TURNS}, "note")
    rows += [json.dumps({"image": "a.jpg", "conversations": turns}) for turns in (None, 3, [None], [{"role": ["user"]}])]
    write_list(folder / "list.json", rows, is_list)
    return convert(llava_json, folder / "list.json", folder / "out", "--val-share", 0.5), len(rows)


def run_editing(folder: Path) -> tuple[dict[str, Any], int]:
    (folder / "a.jpg").write_bytes(photo())
    others = [{"data": [EDIT, {"input": "gone.png"}]}, {**EDIT, "input": {"a": [1]}}]
    rows = [*rows_text(EDIT, "note"), *map(json.dumps, others)]
    write_list(folder / "list.json", rows, is_list=True)
    return convert(editing, folder / "list.json", folder / "out"), len(rows) + 1  # a row of two turns


def run_parquet(folder: Path) -> tuple[dict[str, Any], int]:
    columns = {"image": [photo(), None, b"x", photo(), photo()], "text": ["a", "b", "c", None, '{"0": 3}'], "n": [float("nan")] * 5}
    parquet_of(folder / "in/0.parquet", **columns)
    (folder / "in/1.parquet").write_bytes(b"PAR1 cut short")
    return convert(table, folder / "in", folder / "out"), 5 + 1


def run_pairs(folder: Path, command: Any = blip3o) -> tuple[dict[str, Any], int]:
    write_tars(folder / "in")
    (folder / "in/1.tar").write_bytes(b"no tar at all" * 100)
    # pairs, the member twice, the ambiguous one, 2 hidden files, README, alone, deep, the link, and the file that is no tar
    return convert(command, folder / "in", folder / "out"), 6 + 1 + 1 + 2 + 1 + 1 + 1 + 1 + 1


def run_folder(folder: Path) -> tuple[dict[str, Any], int]:
    files = ["cat/1.jpg", "cat/1.JPG", "cat/1.png", "dog/2.jpg", "cat/x.heic", "dog/.3.jpg", "__MACOSX/cat/1.jpg", ".git/4.jpg"]
    for name in [*files, "loose.jpg", "dog/Thumbs.db"]:
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / name).write_bytes(photo())
    return convert(image_folder, folder / "in", folder / "out", "--val-share", 0), 4 * 2 + 6  # a photo is a row of two parts


def run_coco(folder: Path) -> tuple[dict[str, Any], int]:
    (folder / "in/val").mkdir(parents=True)
    images: list[Any] = [{"id": n, "file_name": f"{n}.jpg"} for n in range(6)]
    for image in images:
        (folder / "in/val" / image["file_name"]).write_bytes(photo())
    captions = [{"image_id": n, "caption": "a dog"} for n in (0, 1, 5)]
    images[5]["file_name"] = "gone.jpg"
    bad = [{"image_id": 2, "caption": None}, {"image_id": [3], "caption": "x"}, 4, {"caption": "x"}]
    bad += [{"image_id": 1, "caption": "\ud800"}]
    lists = {"images": [*images, {"id": 0, "file_name": "other.jpg"}, {}, None], "annotations": captions + bad}
    (folder / "in/captions_val.json").write_text(json.dumps(lists))
    return convert(coco, folder / "in", folder / "out"), 6 + 2 + len(bad)  # images in all, two without id, annotations


CASES: dict[str, Callable[[Path], tuple[dict[str, Any], int]]] = {
    "llava_json list": run_llava,
    "llava_json lines": lambda folder: run_llava(folder, is_list=False),
    "editing": run_editing,
    "table": run_parquet,
    "blip3o": run_pairs,
    "img2dataset": lambda folder: run_pairs(folder, img2dataset),
    "image_folder": run_folder,
    "coco": run_coco,
}


@pytest.mark.parametrize("name", CASES)
def test_counts_add_up_to_the_rows_of_the_source(tmp_path, name):
    report, rows = CASES[name](tmp_path)
    assert sum(report["rows"].values()) == rows
    assert sum(report["converted"].values()) + report["left_out"] == rows
    assert sum(report["reasons"].values()) == report["left_out"] > 0
    assert all(reason.strip() and reason.isprintable() for reason in report["left_out_items"].values())
    assert sum(report["converted"].values()) > 0


ATOMS: list[Any] = [None, True, -1, 2.5, 1e999, 10**50, "", "a.jpg", "../a.jpg", "<image>", "\ud800", "\0", "b.mp4", "[1]"]
ATOMS += [[], {}, [None], ["a.jpg", "gone.png"], {"path": "a.jpg"}, TURNS, "x" * 300]


def mutated(value: Any, chance: random.Random) -> Any:
    """A value with some of its parts replaced, dropped, repeated, or under the key of another."""
    if chance.random() < 0.15:
        return chance.choice(ATOMS)
    if isinstance(value, dict):
        names = [*value, "video", "kind", "role", "id"]
        kept = {name: part for name, part in value.items() if chance.random() > 0.05}
        return {chance.choice([name] * 9 + names): mutated(part, chance) for name, part in kept.items()}
    if isinstance(value, list):
        return [mutated(part, chance) for part in value for _ in range(chance.choice((0, 1, 1, 1, 1, 1, 2)))]
    return value


@pytest.mark.parametrize("seed", range(4))
def test_counts_of_random_rows_add_up_and_the_loader_takes_what_is_written(tmp_path, seed):
    chance = random.Random(seed)
    good = {"id": 1, "image": "a.jpg", "kind": "exists", "conversations": TURNS}
    rows = [good] + [mutated(good, chance) for _ in range(60)]
    (tmp_path / "a.jpg").write_bytes(photo())
    (tmp_path / "list.json").write_text(json.dumps(rows))
    lists: dict[str, Any] = {
        "images": [{"id": n, "file_name": "a.jpg"} for n in range(9)],
        "categories": [{"id": 1, "name": "dog"}],
    }
    lists["annotations"] = [{"id": n, "image_id": n % 9, "category_id": 1, "caption": f"text {n}"} for n in range(30)]
    lists = {name: [rows[0], *(mutated(row, chance) for row in rows)] for name, rows in lists.items()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.jpg").write_bytes(photo())
    for name in ("captions_mine.json", "instances_mine.json"):
        (tmp_path / name).write_text(json.dumps(lists))
    reports = [convert(llava_json, tmp_path / "list.json", tmp_path / "a"), convert(coco, tmp_path, tmp_path / "b")]
    assert reports[0]["rows"] == {"train/conversations": len(rows)}
    for report in reports:
        assert sum(report["rows"].values()) == sum(report["converted"].values()) + sum(report["reasons"].values())
    written = [pair for path in [*tmp_path.rglob("*.tar")] for pair in read_tar(path)]
    assert len(written) == sum(sum(report["samples"].values()) for report in reports)
    assert all(Conversations()(key, members).images is not None for key, members in written)


def test_commands_of_all_converters_are_tried():
    folder = Path(llava_json.__file__).parent
    commands = {path.stem for path in folder.glob("*.py") if "raise SystemExit(run(main" in path.read_text()}
    commands.remove("benchmark")  # it leaves no row out: one that cannot be written ends it
    assert commands == {name.split()[0] for name in CASES}


def test_a_row_that_is_lost_or_counted_twice_is_an_error_of_the_program():
    entry = entry_of(samples=2, converted=2, left_out={"row 2": "bad: very"})
    assert count_rows([("a", entry)], {"a": 3}, {"a": {"not chosen": 4}})["rows"] == {"a": 7}
    assert count_rows([], {"a": 0}, {"a": {"not chosen": 4}})["rows"] == {"a": 4}
    for rows in (2, 4):
        with pytest.raises(RuntimeError, match=f"a: {rows} rows, of which 3"):
            count_rows([("a", entry)], {"a": rows}, {})
