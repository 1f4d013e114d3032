import json
from pathlib import Path

import pytest
from converter_parts import convert as run
from converter_parts import error_of, loaded, photo, samples_in
from converter_parts import parquet_of as write

from data_pipelines.converters import table as command
from data_pipelines.converters.parquet_rows import ParquetRows

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def struct(value: int = 0, kind: str = "JPEG") -> dict:
    return {"bytes": photo(value, kind), "path": None}


def convert(*arguments: object) -> dict:
    return run(*arguments, "--val-share", 0)


def samples(out: Path) -> list[dict]:
    return samples_in(out / "train/*.tar")


def test_captions_are_detected_and_images_kept_byte_for_byte(tmp_path):
    for file, numbers in (("a", range(6)), ("b", range(6, 11))):
        images = [struct(n, "PNG" if n % 2 else "WEBP") for n in numbers]
        write(tmp_path / f"in/{file}.parquet", image=images, caption=[f"text {n}" for n in numbers], score=[0.5] * len(numbers))
    report = convert(command, tmp_path / "in", tmp_path / "out", "--rows-per-shard", 3)
    assert report["samples"] == {"train/captions": 11} and report["shards"] == {"train/captions": 4}
    found = samples(tmp_path / "out")
    assert [sample["turns"] for sample in found] == [["<image>\nDescribe the image.", f"text {n}"] for n in range(11)]
    assert (found[7]["members"]["0.png"], found[7]["score"]) == (photo(7, "PNG"), 0.5)
    assert found[6]["members"]["0.webp"] == photo(6, "WEBP")


def test_plain_binary_columns_named_by_options_can_be_generated(tmp_path):
    write(tmp_path / "in.parquet", photo=[photo(3)], other=[photo(4)], title=["A blue field."], url=["http://a"])
    options = ("--task", "text_to_image", "--image", "photo", "--text", "title")
    convert(command, tmp_path / "in.parquet", tmp_path / "out", *options)
    (sample,) = samples(tmp_path / "out")
    assert sample["turns"] == ["A blue field."] and sample["members"]["target.jpg"] == photo(3) and sample["url"] == "http://a"


def test_questions_take_the_most_frequent_answer_and_keep_all(tmp_path):
    answers = [[{"answer": "red", "id": 1}, {"answer": "blue", "id": 2}, {"answer": "blue", "id": 3}], [{"answer": "2", "id": 1}]]
    write(tmp_path / "in.parquet", image=[struct(), struct()], question=["Which?", "How many?"], answers=answers)
    report = convert(command, tmp_path / "in.parquet", tmp_path / "out")
    assert report["samples"] == {"train/questions": 2}
    first, second = samples(tmp_path / "out")
    assert first["turns"] == ["<image>\nWhich?", "blue"] and first["answers"] == ["red", "blue", "blue"]
    assert second["turns"] == ["<image>\nHow many?", "2"] and "answers" not in second


def test_conversations_of_both_writings_with_lists_of_images_are_read_by_the_loader(tmp_path):
    llava = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "that"}]]
    write(tmp_path / "llava.parquet", id=["x"], image=[struct(1)], conversations=llava)
    cauldron = [[{"user": "Which?", "assistant": "both", "source": "a"}], [{"user": "Why?", "assistant": "so", "source": "b"}]]
    write(tmp_path / "cauldron.parquet", images=[[struct(1), struct(2)], []], texts=cauldron)
    assert convert(command, tmp_path / "llava.parquet", tmp_path / "a")["samples"] == {"train/conversations": 1}
    assert convert(command, tmp_path / "cauldron.parquet", tmp_path / "b")["samples"] == {"train/conversations": 2}
    batch = loaded([str(tmp_path / "a/train"), str(tmp_path / "b/train")])
    assert [turns[0]["text"] for turns in batch.conversations] == ["<image>\nWhat?", "<image>\n<image>\nWhich?", "Why?"]
    assert len(batch.images) == 3


def test_edits_are_detected(tmp_path):
    columns = {"source_image": [struct(1)], "edited_image": [struct(2)], "edit_prompt": ["Make it red."], "edit_type": ["colour"]}
    write(tmp_path / "in.parquet", **columns)
    assert convert(command, tmp_path / "in.parquet", tmp_path / "out")["kinds"] == {"colour": 1}
    (sample,) = samples(tmp_path / "out")
    assert sample["members"]["0.jpg"] == photo(1) and sample["members"]["target.jpg"] == photo(2)


def test_bad_cells_are_left_out_with_their_reason(tmp_path):
    images = [struct(), None, {"bytes": photo()[:100], "path": None}, {"bytes": None, "path": "a.jpg"}, struct(), struct()]
    write(tmp_path / "in.parquet", image=images, text=["a", "b", "c", "d", "", None])
    report = convert(command, tmp_path / "in.parquet", tmp_path / "out")
    assert report["samples"] == {"train/captions": 1}
    assert report["reasons"] == {"missing image": 2, "damaged image": 1, "empty text": 2}


def test_a_damaged_row_group_costs_its_own_rows_and_no_others(tmp_path):
    noise = [f"{n:03d}" + "".join(chr(97 + (n * k) % 26) for k in range(900)) for n in range(12)]
    columns = {"image": [photo(n) for n in range(12)], "text": noise}
    parquet.write_table(arrow.table(columns), tmp_path / "in.parquet", row_group_size=4, compression="gzip")
    content = bytearray((tmp_path / "in.parquet").read_bytes())
    group = parquet.ParquetFile(tmp_path / "in.parquet").metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 40] = bytes(40)
    (tmp_path / "in.parquet").write_bytes(content)
    report = convert(command, tmp_path / "in.parquet", tmp_path / "out")
    assert report["samples"] == {"train/captions": 8} and report["reasons"] == {"unreadable row": 4}


def test_rows_by_number_in_any_order(tmp_path):
    for file in range(2):
        write(tmp_path / f"in/{file}.parquet", row_group_size=25, number=[40 * file + n for n in range(40)], text=["a"] * 40)
    table = ParquetRows(tmp_path / "in")
    order = [0, 1, 79, 39, 40, 16, 15, 60, 2, 78]
    assert [table[number]["number"] for number in order] == order and len(table) == 80


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": [b"x"], "text": ["a"]}, ["--text", "caption"], "found 'caption', expected one of the columns image, text"),
        ({"image": [b"x"], "name": ["a"]}, [], "cannot tell what a row is; the columns are image (image), name (text)"),
        ({"left": [b"x"], "right": [b"x"], "text": ["a"]}, [], "cannot tell what a row is"),
        ({"image": [b"x"], "text": ["a"]}, ["--task", "questions"], "cannot tell columns for questions"),
        ({"image": [b"x"], "text": ["a"]}, [], "nothing could be converted; the first reason: row 0: damaged image"),
        ({"image": [b"x"], "text": ["a"]}, ["--rows-per-shard", "0"], "--rows-per-shard: found 0"),
    ],
)
def test_user_errors_are_one_line(tmp_path, capsys, columns, options, message):
    write(tmp_path / "in.parquet", **columns)
    assert message in error_of(command, [tmp_path / "in.parquet", tmp_path / "out", *options], capsys)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ('{"0": "a dog"}', "a dog"),
        ('{"0": "", "1": "a dog", "2": null}', "a dog"),
        ('["a dog"]', "a dog"),
        ("{a dog}", "{a dog}"),
        (' {"0": " a dog "} ', "a dog"),
    ],
)
def test_captions_in_json_text_are_taken_out_of_it(tmp_path, cell, text):
    write(tmp_path / "in.parquet", image=[photo()], captions=[cell])
    convert(command, tmp_path / "in.parquet", tmp_path / "out")
    (sample,) = samples(tmp_path / "out")
    assert sample["turns"][1] == text


def test_of_several_captions_in_json_text_the_row_s_number_chooses(tmp_path):
    write(tmp_path / "in.parquet", image=[photo()] * 3, captions=['{"0": "one", "1": "two"}'] * 3)
    convert(command, tmp_path / "in.parquet", tmp_path / "out", "--task", "text_to_image", "--captions", "one")
    assert [sample["turns"] for sample in samples(tmp_path / "out")] == [["one"], ["two"], ["one"]]


@pytest.mark.parametrize("cell", ['{"0": 3}', '{"0": null}', "{}", "[]", '[["a dog"]]', '{"box": [1, 2]}'])
def test_other_json_text_is_no_caption(tmp_path, cell):
    write(tmp_path / "in.parquet", image=[photo()] * 2, captions=[cell, "a dog"])
    report = convert(command, tmp_path / "in.parquet", tmp_path / "out")
    assert report["samples"] == {"train/captions": 1} and report["left_out"] == 1


def test_turns_and_answers_in_json_text_are_read_and_boxes_are_not(tmp_path):
    turns = json.dumps([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "that"}])
    write(tmp_path / "turns.parquet", image=[photo()], conversations=[turns])
    convert(command, tmp_path / "turns.parquet", tmp_path / "a")
    answers = ['["red", "blue", "blue"]', '[{"answer": "2"}]', "[0.1, 0.2, 0.3, 0.4]", "[sic]"]
    write(tmp_path / "answers.parquet", image=[photo()] * 4, question=["Which?"] * 4, answer=answers)
    convert(command, tmp_path / "answers.parquet", tmp_path / "b")
    said = [sample["turns"][1] for folder in ("a", "b") for sample in samples(tmp_path / folder)]
    assert said == ["that", "blue", "2", "[0.1, 0.2, 0.3, 0.4]", "[sic]"]


def test_a_number_that_is_none_is_no_answer_and_a_row_keeps_its_kind(tmp_path):
    columns = {"image": [photo()] * 2, "question": ["How many?"] * 2, "answer": [float("nan"), 2.0], "kind": ["count"] * 2}
    write(tmp_path / "in.parquet", **columns)
    report = convert(command, tmp_path / "in.parquet", tmp_path / "out")
    assert report["reasons"] == {"empty answer": 1} and report["kinds"] == {"count": 1}


def test_a_text_that_is_not_utf_8_costs_its_own_row(tmp_path):
    texts = arrow.StringArray.from_buffers(3, arrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), arrow.py_buffer(b"a\xe9c"))
    parquet.write_table(arrow.table({"image": [photo()] * 3, "text": texts}), tmp_path / "in.parquet")
    report = convert(command, tmp_path / "in.parquet", tmp_path / "out")
    assert report["samples"] == {"train/captions": 2} and list(report["left_out_items"]) == ["row 1"]
