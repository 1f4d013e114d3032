import json
import sys
from pathlib import Path

import pytest
from converter_parts import convert as convert_with
from converter_parts import error_of, loaded, parquet_of, photo, samples_in

from data_pipelines.converters import editing
from data_pipelines.tasks import Editing


def image(value: int = 0, kind: str = "PNG") -> bytes:
    return photo(value, kind)


def folder_of(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image(number, "JPEG" if name.endswith("jpg") else "PNG"))
    return folder


def convert(folder: Path, rows: list, *options: object) -> dict:
    (folder / "list.json").write_text(json.dumps(rows))
    return convert_with(editing, folder / "list.json", folder / "out", "--images", folder / "images", *options)


def samples(out: Path) -> list[dict]:
    return samples_in(out / "train/editing-*.tar")


@pytest.mark.parametrize(
    "row",
    [
        {"input": "a.png", "instruction": "Make it red.", "output": "b.jpg"},
        {"source_image": "a.png", "edit_prompt": "Make it red.", "target_image": "b.jpg"},
        {"image": "a.png", "prompt": "Make it red.", "edited_image": "b.jpg"},
        {"input_images": ["a.png"], "output_images": ["b.jpg"], "prompt": "Make it red."},
        {"src_img": "a.png", "edited_img": "b.jpg", "edited_prompt_list": ["Make it red."]},
    ],
)
def test_each_layout_gives_the_same_edit_with_its_bytes(tmp_path, row):
    folder_of(tmp_path / "images", "a.png", "b.jpg")
    convert(tmp_path, [row])
    (sample,) = samples(tmp_path / "out")
    assert sample["conversations"] == [{"role": "user", "text": "<image>\nMake it red."}]
    assert (sample["task"], sample["kind"]) == ("editing", "edit")
    assert (sample["members"]["0.png"], sample["members"]["target.jpg"]) == (image(0), image(1, "JPEG"))


def test_uniworld_s_references_and_its_image_to_generate(tmp_path):
    folder_of(tmp_path / "images", "a.png", "b.png", "c.png")
    turns = lambda asked, answer: [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]  # noqa: E731
    rows = [
        {"image": ["a.png", "b.png", "c.png"], "conversations": turns("Put <image> on <image>.", "<gen_image>")},
        {"image": ["a.png", "b.png"], "conversations": turns("<image>\nRemove it.", "<gen_image>"), "kind": "remove"},
        {"image": ["c.png"], "conversations": turns("A cat.", "<gen_image>")},
        {"image": ["a.png"], "conversations": turns("<image>\nWhat is it?", "A cat.")},
        {"image": ["a.png"], "conversations": turns("<image>\nRemove it.", "<gen_image>")},
    ]
    report = convert(tmp_path, rows)
    assert report["kinds"] == {"edit": 1, "remove": 1, "text_to_image": 1}
    assert report["reasons"] == {"no image to generate": 1, "more markers than images": 1}
    first, second, third = samples(tmp_path / "out")
    assert [first["members"][name] for name in ("0.png", "1.png", "target.png")] == [image(0), image(1), image(2)]
    assert first["conversations"] == [{"role": "user", "text": "Put <image> on <image>."}]
    assert second["members"]["target.png"] == image(1) and "1.png" not in second["members"]
    assert third["conversations"] == [{"role": "user", "text": "A cat."}] and third["task"] == "text_to_image"


@pytest.mark.parametrize(
    ("own", "kind", "kept"),
    [
        ({"edit_type": "add", "category": "animal", "task": "x"}, "add", {"category": "animal", "row_task": "x"}),
        ({"edit_type": "a name that is too long for the records of a metric", "kind": "add"}, "add", {}),
        ({"kind": ["add"], "category": 3}, "edit", {"category": 3}),
    ],
)
def test_a_row_s_kind_is_taken_and_what_else_it_says_is_kept(tmp_path, own, kind, kept):
    folder_of(tmp_path / "images", "a.png")
    turns = [{"from": "human", "value": "A cat."}, {"from": "gpt", "value": "<gen_image>"}]
    rows = [{"input": "a.png", "instruction": "Do.", "output": "a.png", **own}, {"image": ["a.png"], "conversations": turns, **own}]
    convert(tmp_path, rows)
    edit, generated = samples(tmp_path / "out")
    assert edit["kind"] == kind and generated["kind"] == (kind if kind != "edit" else "text_to_image")
    assert all(row[name] == value for row in (edit, generated) for name, value in kept.items())


def test_turns_of_a_multi_turn_edit_are_samples_of_their_own(tmp_path):
    folder_of(tmp_path / "images", "0/a.png", "0/b.png", "0/c.png")
    turn = lambda source, target, prompt: {"input_images": [source], "output_images": [target], "prompt": prompt}  # noqa: E731
    turns = [turn("0/a.png", "0/b.png", "One."), turn("0/b.png", "0/gone.png", "Two."), turn("0/b.png", "0/c.png", "Three.")]
    report = convert(tmp_path, [{"data": turns}])
    assert [(sample["key"], sample["turn"]) for sample in samples(tmp_path / "out")] == [("00000000-0", 0), ("00000000-2", 2)]
    assert report["left_out_items"] == {"row 0, turn 1": "missing image: 0/gone.png"}


def test_keys_of_one_s_own_with_two_input_images_are_read_by_the_loader(tmp_path):
    folder_of(tmp_path / "images", "me.png", "coat.png", "worn.png")
    rows = [{"person": "me.png", "garment": "coat.png", "text": "Wear it.", "worn": "worn.png", "score": 0.5, "id": 7}]
    convert(tmp_path, rows, "--input", "person", "garment", "--instruction", "text", "--target", "worn")
    batch = loaded(str(tmp_path / "out/train"), Editing())
    assert batch.conversations[0][0]["text"] == "<image>\n<image>\nWear it."
    assert len(batch.images) == 2 and len(batch.requested) == 1
    assert (batch.meta[0]["score"], batch.meta[0]["id"]) == (0.5, 7)


def test_what_is_not_understood_is_left_out_with_the_keys_found(tmp_path):
    folder_of(tmp_path / "images", "a.png", "b.png")
    good = {"input": "a.png", "instruction": "Do.", "output": "b.png"}
    rows = [good, {**good, "output": ["a.png", "b.png"]}, {**good, "instruction": "  "}, {**good, "input": "../list.json"}]
    rows += [{"x": 1}, {**good, "output": None}, {**good, "input": "list.json"}, 5]
    report = convert(tmp_path, rows)
    assert report["samples"] == {"train/editing": 1}
    assert report["left_out_items"]["row 4"] == "no input image: the row has x"
    assert report["left_out_items"]["row 5"] == "no image to generate: the row has input, instruction, output"
    reasons = ["several images to generate", "empty instruction", "image outside of the folder", "no input image"]
    assert report["reasons"] == dict.fromkeys([*reasons, "no image to generate", "missing image", "row is no object"], 1)


def test_parquet_with_image_bytes_like_omniedit(tmp_path):
    for file, numbers in (("train-0", range(20)), ("train-1", range(20, 23))):
        columns = {
            "omni_edit_id": [f"task_{n}" for n in numbers],
            "task": ["removal"] * len(numbers),
            "src_img": [{"bytes": image(n), "path": None} for n in numbers],
            "edited_img": [{"bytes": image(100 + n, "JPEG"), "path": "x.jpg"} for n in numbers],
            "edited_prompt_list": [[f"Remove {n}.", f"Take {n} away."] for n in numbers],
            "o_score": [0.5] * len(numbers),
        }
        parquet_of(tmp_path / f"data/{file}.parquet", row_group_size=7, **columns)
    (tmp_path / "data/train-2.parquet").write_bytes(b"PAR1 cut short")
    report = convert_with(editing, tmp_path / "data", tmp_path / "out", "--rows-per-shard", 10)
    assert report["samples"] == {"train/editing": 23} and report["kinds"] == {"removal": 23}
    assert report["reasons"] == {"unreadable file": 1}
    found = {sample["omni_edit_id"]: sample for sample in samples(tmp_path / "out")}
    assert found["task_21"]["conversations"][0]["text"] == "<image>\nTake 21 away."
    assert found["task_20"]["conversations"][0]["text"] == "<image>\nRemove 20."
    assert all(s["members"]["0.png"] == image(n) for n in range(23) for s in [found[f"task_{n}"]])
    assert found["task_22"]["members"]["target.jpg"] == image(122, "JPEG")


def test_parquet_with_names_like_imgedit(tmp_path):
    folder_of(tmp_path / "images", "r/original.png", "r/result.png")
    columns = {"input_images": [["r/original.png"]], "output_images": [["r/result.png"]], "prompt": ["Remove it."]}
    parquet_of(tmp_path / "remove.parquet", **columns)
    convert_with(editing, tmp_path / "remove.parquet", tmp_path / "out", "--images", tmp_path / "images")
    (sample,) = samples(tmp_path / "out")
    assert sample["members"]["target.png"] == image(1)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    error = error_of(editing, [tmp_path / "a.parquet", tmp_path / "out"], capsys)
    assert error == "error: reading parquet needs pyarrow; pip install 'umm_zoo[parquet]'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json", "out"], "nowhere.json: no such file"),
        (["nowhere.parquet", "out"], "nowhere.parquet: no parquet file found there"),
        (["list.json", "out", "--images", "nowhere"], "--images: nowhere: no such folder"),
        (["list.json", "out"], "nothing could be converted; the first reason: row 0: no input image: the row has a"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text('[{"a": 1}]')
    assert message in error_of(editing, arguments, capsys)
