"""What a source holds beside the parts that are read is refused or counted, and costs no other row."""

import json
import os

import pytest
from converter_parts import convert, error_of, parquet_of, photo, samples_in

from data_pipelines.converters import blip3o, editing, image_folder, table
from data_pipelines.shards.index import load_index
from umm_zoo.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
EDIT = {"input_image": "a.jpg", "instruction": "Do.", "output_image": "b.jpg"}
ASKED = [{"from": "human", "value": "<image>\nDo."}, {"from": "gpt", "value": "<gen_image>"}]


@pytest.mark.parametrize(
    ("row", "reason", "note"),
    [
        (EDIT | {"mask_image": "c.jpg"}, "", "file under the key 'mask_image' that is not converted"),
        (EDIT | {"input_image_2": "c.jpg"}, "", "file under the key 'input_image_2' that is not converted"),
        (EDIT | {"id": "a.jpg"}, "", ""),
        (EDIT | {"video": "c.mp4"}, "not of images alone: 'video'", ""),
        (EDIT | {"instruction": "Do.\n<video>"}, "not of images alone: <video> in a turn", ""),
        ({"image": ["a.jpg", None], "conversations": ASKED}, "no image to generate: the last of 'image' is empty", ""),
    ],
)
def test_other_files_of_an_edit(tmp_path, row, reason, note):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(photo())
    (tmp_path / "list.json").write_text(json.dumps([EDIT, row]))
    report = convert(editing, tmp_path / "list.json", tmp_path / "out")
    assert report["left_out_items"] == ({"row 1": reason} if reason else {})
    assert report["notes"] == ({note: 1} if note else {})


def test_an_image_of_a_list_that_is_empty_and_one_in_a_column_that_nobody_reads(tmp_path):
    images = [[photo(1), None], [photo(2)], [photo(3), photo(4)]]
    parquet_of(tmp_path / "in/0.parquet", image=images, depth=[photo()] * 3, question=["what?"] * 3, answer=["that"] * 3)
    report = convert(table, tmp_path / "in", tmp_path / "out")
    assert report["left_out_items"] == {"row 0": "missing image: 1 of a list of 2 are empty"}
    assert report["notes"] == {"image in the column 'depth' that is not converted": 2}


def test_a_class_folder_that_is_not_utf8_or_a_system_s_costs_no_photo_of_the_others(tmp_path):
    for folder in (b"cat", b"dog", b"caf\xe9", b"lost+found", b"$RECYCLE.BIN"):
        os.makedirs(path := os.path.join(os.fsencode(tmp_path / "in"), folder))
        for number in range(4):
            with open(os.path.join(path, b"%d.jpg" % number), "wb") as file:
                file.write(photo())
    report = convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    assert report["reasons"] == {"class name that is not UTF-8": 4, "hidden file": 8}
    assert {row["class"] for row in samples_in(tmp_path / "out/train/*.tar")} == {"cat", "dog"}
    assert report["converted"] == {"train/questions": 8, "train/captions": 8, "source": 0}


@pytest.mark.parametrize(
    ("content", "reason"), [(POINTER, "a Git-LFS pointer"), (b"<html></html>", "a web page"), (b"", "an empty file")]
)
def test_what_stands_for_a_tar_says_what_it_is(tmp_path, capsys, content, reason):
    (tmp_path / "0.tar").write_bytes(content)
    assert reason in error_of(blip3o, [tmp_path, tmp_path / "out"], capsys)
    with pytest.raises(UserError, match=reason):
        load_index(str(tmp_path / "0.tar"))
