"""Tables of one's own: what a row becomes, which split, which image; odd rows end as samples or as counted, named reasons."""

from __future__ import annotations

import csv
import json
import os
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from converter_parts import convert, error_of, loaded, parquet_of, photo, samples_in

from data_pipelines import inspect
from data_pipelines.converters import table as command
from umm_zoo import fit
from umm_zoo.batch import Task

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "that"}]


def photos(folder: Path, *names: str) -> Path:
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo(place))
    return folder


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sheet(path: Path, header: str, *rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header.split(","), *rows])
    return path


def whole(source: Path, *options: object) -> dict[str, Any]:
    """The report of a conversion without held-out images, into the folder ``out`` beside the table."""
    return convert(command, source, source.parent / "out", "--val-share", 0, *options)


def made(folder: Path, pattern: str = "train/*.tar") -> list[dict[str, Any]]:
    return samples_in(folder / "out" / pattern)


def test_captions_of_a_csv_keep_the_file_s_bytes_and_the_other_columns(tmp_path):
    photos(tmp_path, "a.jpg", "b c.png")
    source = sheet(
        tmp_path / "t.csv", "id,Image,Caption,score", ["7", "a.jpg", "A dog, running.", "0.5"], ["8", "b c.png", "Naïve 猫", ""]
    )
    report = whole(source)
    assert report["samples"] == {"train/captions": 2}
    first, second = made(tmp_path)
    assert first["turns"] == ["<image>\nDescribe the image.", "A dog, running."] and first["members"]["0.jpg"] == photo(0)
    assert (first["id"], first["score"], first["file"]) == ("7", "0.5", "a.jpg")
    assert second["turns"][1] == "Naïve 猫" and "score" not in second and "captions" not in second


@pytest.mark.parametrize(
    ("row", "said", "columns"),
    [
        ({"file_name": "a.jpg", "text": "A dog"}, "captions: image in 'file_name'; text in 'text'", 1),
        ({"filepath": "a.jpg", "title": "A dog", "label": "x"}, "captions: image in 'filepath'; text in 'title'", 1),
        ({"Image Path": "a.jpg", "Alt-Text": "A dog"}, "captions: image in 'Image Path'; text in 'Alt-Text'", 1),
        ({"image": "a.jpg", "prompt": "A dog"}, "text_to_image: image in 'image'; text in 'prompt'", 1),
        ({"target_file_name": "a.jpg", "caption": "A dog"}, "text_to_image: image in 'target_file_name'; text in 'caption'", 1),
        (
            {"image": "a.jpg", "question": "Q?", "answer": "A"},
            "questions: image in 'image'; text in 'question'; answer",
            1,
        ),
        (
            {"image": "a.jpg", "instruction": "Q?", "output": "A"},
            "questions: image in 'image'; text in 'instruction'",
            1,
        ),
        ({"image": "a.jpg", "messages": TURNS}, "conversations: image in 'image'; text in 'messages'", 1),
        ({"image": "a.jpg", "talk": json.dumps(TURNS)}, "conversations: image in 'image'; text in 'talk'", 1),
        (
            {"source": "a.jpg", "target": "b.jpg", "instruction": "Do."},
            "editing: image in 'source'; text in 'instruction'; target in 'target'",
            2,
        ),
        (
            {"input_file_name": "a.jpg", "edited_file_name": "b.jpg", "edit_prompt": "Do."},
            "editing: image in 'input_file_name'; text in 'edit_prompt'; target in 'edited_file_name'",
            2,
        ),
        (
            {"image_1": "a.jpg", "image_2": "b.jpg", "caption": "Two"},
            "captions: image in 'image_1', 'image_2'; text in 'caption'",
            2,
        ),
        ({"image": "a.jpg", "caption": "x", "caption_1": "y"}, "captions: image in 'image'; text in 'caption', 'caption_1'", 1),
        ({"image": ["a.jpg", "b.jpg"], "question": "Q?", "answer": 2}, "questions: image in 'image'", 2),
        ({"image": {"path": "a.jpg", "bytes": None}, "caption": "A dog"}, "captions: image in 'image'", 1),
    ],
)
def test_what_a_row_is_is_found_and_said(tmp_path, capsys, row, said, columns):
    photos(tmp_path, "a.jpg", "b.jpg")
    assert whole(lines(tmp_path / "t.jsonl", row, row), "--rows-per-shard", 5)["left_out"] == 0
    assert said in capsys.readouterr().err
    sample = made(tmp_path)[0]
    assert len([name for name in sample["members"] if name != "json"]) == columns


def test_columns_are_named_by_options(tmp_path):
    photos(tmp_path, "a.jpg", "b.jpg")
    source = sheet(tmp_path / "t.tsv", "x,y,z", ["a.jpg", "b.jpg", "Make it red"])
    whole(source, "--delimiter", ",", "--image-column", "y", "--text-column", "z")
    assert made(tmp_path)[0]["members"]["0.jpg"] == photo(1)
    convert(command, source, tmp_path / "edits", "--delimiter", ",", "--input", "x", "--instruction", "z", "--target", "y")
    (edit,) = samples_in(tmp_path / "edits/train/*.tar")
    assert edit["turns"] == ["<image>\nMake it red"] and edit["members"]["target.jpg"] == photo(1)


def test_every_caption_of_an_image_is_a_sample_in_train_and_every_image_in_val(tmp_path):
    photos(tmp_path, *(f"{number}.jpg" for number in range(30)))
    rows = [[f"{number}.jpg", f"{number} {place}"] for number in range(30) for place in range(3)]
    report = convert(command, sheet(tmp_path / "t.csv", "image,caption", *rows), tmp_path / "out", "--val-share", 0.2)
    train, val = made(tmp_path), made(tmp_path, "val/*.tar")
    assert len(train) == 3 * (30 - len(val)) and 2 <= len(val) <= 12
    assert sum(report["rows"].values()) == 90 and report["left_out"] == 2 * len(val)
    for sample in val:
        number = sample["file"].removesuffix(".jpg")
        assert sample["captions"] == [f"{number} {place}" for place in range(3)] and sample["turns"][1] in sample["captions"]
    assert not {sample["file"] for sample in train} & {sample["file"] for sample in val}
    one = convert(command, tmp_path / "t.csv", tmp_path / "one", "--val-share", 0.2, "--captions", "one")
    assert one["samples"]["train/captions"] == 30 - len(val)


def test_several_captions_in_columns_and_in_lists(tmp_path):
    photos(tmp_path, "a.jpg", "b.jpg")
    source = sheet(
        tmp_path / "t.csv", "image,caption,caption,caption3", ["a.jpg", "x", "", "y"], ["b.jpg", '["v", "w", ""]', "", "NaN"]
    )
    assert whole(source)["samples"] == {"train/captions": 4}
    assert [(row["key"], row["turns"][1], row["captions"]) for row in made(tmp_path)] == [
        ("00000000-0", "x", ["x", "y"]),
        ("00000000-1", "y", ["x", "y"]),
        ("00000001-0", "v", ["v", "w"]),
        ("00000001-1", "w", ["v", "w"]),
    ]


def test_some_images_are_held_out_however_few_and_rows_of_one_stay_together(tmp_path):
    photos(tmp_path, "a.jpg", "b.jpg", "sub/a.jpg")
    names = ["a.jpg", "./a.jpg", "b.jpg", "sub/a.jpg", "sub\\a.jpg"]
    source = sheet(tmp_path / "t.csv", "image,question,answer", *([name, f"Q{place}?", "yes"] for place, name in enumerate(names)))
    assert convert(command, source, tmp_path / "out", "--val-share", 0.01)["left_out"] == 0
    splits = {row["turns"][0][-2]: split for split in ("train", "val") for row in made(tmp_path, f"{split}/*.tar")}
    assert sorted(set(splits.values())) == ["train", "val"]
    assert splits["0"] == splits["1"] and splits["3"] == splits["4"]


def test_splits_of_a_column_of_folders_and_of_parquet_names(tmp_path):
    photos(tmp_path / "a", "0.jpg", "1.jpg", "2.jpg", "3.jpg")
    rows = [
        {"file_name": f"{number}.jpg", "text": "t", "split": split}
        for number, split in enumerate(["train", "restval", "VAL", "test"])
    ]
    convert(command, lines(tmp_path / "a/metadata.jsonl", *rows), tmp_path / "a/out")
    assert [len(made(tmp_path / "a", f"{split}/*.tar")) for split in ("train", "val", "test")] == [2, 1, 1]

    for split in ("train", "validation"):
        photos(tmp_path / "b" / split, "same.jpg")
        sheet(tmp_path / "b" / split / "metadata.csv", "file_name,text", ["same.jpg", split])
    convert(command, tmp_path / "b", tmp_path / "out")
    assert [row["turns"][1] for split in ("train", "val") for row in made(tmp_path, f"{split}/*.tar")] == ["train", "validation"]

    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        parquet_of(tmp_path / f"c/data/{name}.parquet", image=[photo(1)], text=[name])
    convert(command, tmp_path / "c", tmp_path / "c/out")
    assert [len(made(tmp_path / "c", f"{split}/*.tar")) for split in ("train", "val", "test")] == [2, 0, 1]


def test_a_split_column_of_something_else_is_said_and_one_that_is_named_holds(tmp_path, capsys):
    photos(tmp_path, "a.jpg", "b.jpg")
    source = sheet(tmp_path / "t.csv", "image,caption,split", ["a.jpg", "x", "train"], ["b.jpg", "y", "banana"])
    assert whole(source)["samples"] == {"train/captions": 2}
    assert "the column 'split' is not used" in capsys.readouterr().err
    report = convert(command, source, tmp_path / "named", "--split", "split")
    assert report["left_out_items"] == {"row 1": "unknown split: 'banana'"}


def test_parquet_with_names_of_images_and_with_the_same_bytes_twice(tmp_path):
    photos(tmp_path, "in/a.jpg", "in/b.jpg")
    parquet_of(tmp_path / "in/t.parquet", file_path=["a.jpg", "b.jpg"], caption=["x", "y"])
    assert whole(tmp_path / "in/t.parquet")["samples"] == {"train/captions": 2}
    images = [photo(number // 2) for number in range(40)]
    parquet_of(tmp_path / "vqa/t.parquet", image=images, question=["Q?"] * 40, answer=[str(n // 2) for n in range(40)])
    convert(command, tmp_path / "vqa/t.parquet", tmp_path / "out", "--val-share", 0.3)
    train, val = ({row["turns"][1] for row in made(tmp_path, f"{split}/*.tar")} for split in ("train", "val"))
    assert val and not train & val and len(train | val) == 20


NAMES = {
    "plain.jpg": "",
    "sub/deep.png": "",
    "sub\\deep.png": "",
    "./plain.jpg": "",
    " plain.jpg ": "",
    "PLAIN.JPG": "",
    "Sub/Deep.PNG": "",
    "bare": "",
    unicodedata.normalize("NFD", "café.jpg"): "",
    "gone.jpg": "missing image",
    "": "missing image",
    "sub": "missing image",
    "../t/plain.jpg": "image outside of the folder",
    "/etc/passwd": "image outside of the folder",
    "C:\\photos\\plain.jpg": "image outside of the folder",
    "\\\\server\\share\\plain.jpg": "image outside of the folder",
    "https://example.com/plain.jpg": "address of an image, which is not downloaded",
    "s3://bucket/plain.jpg": "address of an image, which is not downloaded",
    "data:image/png;base64,AAAA": "bad image name",
    '["plain.jpg", ""]': "missing image",
    "text.jpg": "damaged image",
    "twice.jpg": "missing image",
}


def test_names_of_images_each_found_or_left_out_by_name(tmp_path):
    photos(tmp_path / "t", "plain.jpg", "sub/deep.png", "café.jpg", "bare.jpg", "TWICE.jpg", "Twice.jpg")
    (tmp_path / "t/text.jpg").write_text("no image")
    names = [*NAMES, str(tmp_path / "t/plain.jpg"), "file://" + str(tmp_path / "t/plain.jpg")]
    source = sheet(tmp_path / "t/list.csv", "image,caption", *([name, "text"] for name in names))
    report = convert(command, source, tmp_path / "t/out", "--val-share", 0)
    expected = [f"row {place}" for place, name in enumerate(names) if NAMES.get(name)]
    assert list(report["left_out_items"]) == expected
    assert [report["left_out_items"][row].partition(": ")[0] for row in expected] == [why for why in NAMES.values() if why]
    assert report["notes"]["image taken whose name differs in upper and lower case"] == 2
    assert report["notes"]["image of another suffix taken than the one named"] == 1


def test_images_may_lie_in_another_folder_or_beside_the_table_s(tmp_path):
    photos(tmp_path / "data/images", "a.jpg", "b.jpg")
    source = sheet(tmp_path / "data/lists/t.csv", "image,caption", ["images/a.jpg", "x"], ["../images/b.jpg", "y"])
    assert convert(command, source, tmp_path / "out", "--val-share", 0, "--images", tmp_path / "data")["left_out"] == 0
    report = convert(
        command, source, tmp_path / "strict", "--val-share", 0, "--images", tmp_path / "data/images", "--captions", "one"
    )
    assert report["left_out_items"] == {"row 0": "missing image: images/a.jpg"}


def test_cells_that_are_no_text_or_answer(tmp_path):
    photos(tmp_path, "a.jpg")
    cells: list[Any] = ["ok", "", "  ", None, float("nan"), 3, [], ["x", 5], {"0": ""}, "<image>", True]
    report = whole(lines(tmp_path / "t.jsonl", *({"image": "a.jpg", "caption": cell} for cell in cells)))
    texts = [row["turns"][1] for row in made(tmp_path)]
    assert texts == ["ok", "3"] and report["reasons"] == {"empty text": 8, "text is something else than a text": 1}
    answers = ["yes", "", "NaN", "0", '["a", "b", "b"]']
    source = sheet(tmp_path / "q/t.csv", "image,question,answer", *(["../a.jpg", "Q?", answer] for answer in answers))
    report = whole(source, "--images", tmp_path)
    assert [row["turns"][1] for row in made(tmp_path / "q")] == ["yes", "0", "b"] and report["reasons"] == {"empty answer": 2}


def test_repairs_and_bad_lines_of_text_files_are_in_the_report(tmp_path):
    photos(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "t.csv").write_text('image,caption\na.jpg,"A dog" barks\nb.jpg,one, two\nc.jpg\na.jpg,"fine, really"\n')
    report = whole(tmp_path / "t.csv")
    assert report["notes"] == {"quotes that do not match taken as they stand": 1}
    assert report["reasons"] == {"row of too many cells": 1, "empty text": 1}
    (tmp_path / "t.jsonl").write_text(
        '{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg", "capt\n[]\n{"image": "c.jpg", "caption": "z"}\n'
    )
    assert list(convert(command, tmp_path / "t.jsonl", tmp_path / "json", "--val-share", 0)["left_out_items"]) == ["row 1", "row 2"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "t.csv",
            "url,caption\nhttps://a/1.jpg,x\n",
            [],
            "the images are addresses ('url'), and nothing is downloaded",
        ),
        ("t.csv", "image,label\na.jpg,cat\n", [], "cannot tell what a row is; the columns are image (image), label (text)"),
        ("t.csv", "caption,label\nx,cat\n", [], "cannot tell what a row is"),
        (
            "t.csv",
            "image,caption\na.jpg,x\n",
            ["--text", "title"],
            "--text: found 'title', expected one of the columns image",
        ),
        ("t.csv", "image,caption\na.jpg,x\n", ["--delimiter", "ab"], "--delimiter: found 'ab'"),
        ("t.csv", "image,caption\ngone.jpg,x\n", [], "row 0: missing image: gone.jpg; --images names the folder"),
        ("t.xlsx", "PK", [], "found a file that ends in '.xlsx', expected .csv"),
        ("t.json", '{"image": {"0": "a.jpg"}, "caption": {"0": "x"}}', [], "found one object of columns, expected a JSON list"),
        ("t.json", '{"rows": [{"image": "a.jpg", "caption": "x"}]}', [], "found one object with a list of 1 under 'rows'"),
        ("t.json", '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}', [], "found the layout of COCO"),
        ("gone.csv", None, [], "no such file"),
        (".", None, [], "a folder without metadata.jsonl, metadata.csv or parquet files"),
    ],
)
def test_user_errors_are_one_line(tmp_path, capsys, name, content, options, message):
    (tmp_path / "a.jpg").write_bytes(photo())
    if content is not None:
        (tmp_path / name).write_text(content)
    assert message in error_of(command, [tmp_path / name, tmp_path / "out", *options], capsys)


def test_a_list_of_numbered_captions_without_a_header_as_flickr8k_s(tmp_path):
    photos(tmp_path, "a.jpg", "b.jpg")
    text = "".join(f"{name}.jpg#{number}\tA dog , number {number} .\n" for name in "ab" for number in range(2))
    (tmp_path / "t.token.txt").write_text(text)
    assert whole(tmp_path / "t.token.txt", "--columns", "image,caption")["samples"] == {"train/captions": 4}
    captions = ["A dog , number 0 .", "A dog , number 1 ."]
    assert [(row["file"], row["captions"]) for row in made(tmp_path)] == [(f"{name}.jpg", captions) for name in "aabb"]


def test_a_table_without_its_images_says_in_which_folder_they_are(tmp_path, capsys):
    photos(tmp_path / "images", "a.jpg")
    source = sheet(tmp_path / "t.csv", "image,caption", ["a.jpg", "x"])
    assert error_of(command, [source, tmp_path / "out"], capsys).endswith(
        f"missing image: a.jpg; --images {tmp_path / 'images'} has it"
    )


def test_the_loader_reads_what_was_written(tmp_path):
    photos(tmp_path, "a.jpg", "b.jpg")
    whole(lines(tmp_path / "t.jsonl", {"image": "a.jpg", "target": "b.jpg", "instruction": "Do."}))
    batch = loaded(str(tmp_path / "out/train"))
    assert batch.tasks == [Task.EDIT] and batch.image_counts == [1]


def test_a_stopped_conversion_goes_on_and_a_changed_table_is_another(tmp_path, capsys):
    photos(tmp_path, *(f"{number}.jpg" for number in range(7)))
    source = sheet(tmp_path / "t.csv", "image,caption", *([f"{number}.jpg", "x"] for number in range(7)))
    whole(source, "--rows-per-shard", 2)
    os.unlink(tmp_path / "out/train/captions-000002.tar")
    kept = (tmp_path / "out/train/captions-000001.tar").stat().st_mtime_ns
    whole(source, "--rows-per-shard", 2)
    assert len(made(tmp_path)) == 7 and (tmp_path / "out/train/captions-000001.tar").stat().st_mtime_ns == kept
    source.write_text(source.read_text().replace("x", "y"))
    line = error_of(command, [source, tmp_path / "out", "--val-share", "0", "--rows-per-shard", "2"], capsys)
    assert "holds a conversion of other arguments" in line


@pytest.mark.parametrize("task", command.TASKS)
def test_the_commands_that_it_prints_work_as_they_are(tmp_path, capsys, task):
    photos(tmp_path, *(f"{number}.jpg" for number in range(12)))
    columns: dict[str, dict[str, Any]] = {"captions": {"caption": "a dog"}, "questions": {"question": "Q?", "answer": "A"}}
    columns |= {"conversations": {"messages": TURNS}, "text_to_image": {"prompt": "a dog"}}
    columns |= {"editing": {"edit": "Make it red, please: 猫.", "target": "0.jpg"}}
    row = columns[task]
    source = lines(tmp_path / "t.jsonl", *({"image": f"{number}.jpg", **row} for number in range(12)))
    convert(command, source, tmp_path / "o ut")
    inspected, fitted = (shlex.split(line) for line in capsys.readouterr().out.split("next:\n")[1].splitlines())
    assert inspected[:3] == ["python", "-m", "data_pipelines.inspect"] and fitted[:3] == ["python", "-m", "umm_zoo.fit"]
    assert fitted[-1] == f"name=o-ut-{task}"
    inspect.main(inspect.parser().parse_args([*inspected[3:-1], str(tmp_path / "sheet.png")]))
    small = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu", "data.batch_size=4"]
    assert fit.main([*fitted[3:], *small, "--runs", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "sheet.png").is_file() and (tmp_path / f"runs/o-ut-{task}/metrics.json").is_file()
