import io
import json
from pathlib import Path

import pytest
from converter_parts import convert as convert_with
from converter_parts import error_of, loaded, same_files, samples_in
from PIL import Image

from data_pipelines.converters import llava_json
from data_pipelines.converters.llava_json import reconcile
from data_pipelines.decoding import BadSampleError
from umm_zoo.metrics import YesNo
from umm_zoo.outputs import Outputs


def image(path: Path, size: tuple[int, int] = (9, 6), kind: str = "JPEG") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (len(path.name), 50, 99)).save(path, kind)
    return path.read_bytes()


def row(*texts: str, **rest: object) -> dict:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {**rest, "conversations": turns}


def convert(folder: Path, rows: list[dict], *options: object) -> dict:
    (folder / "list.json").write_text(json.dumps(rows))
    return convert_with(llava_json, folder / "list.json", folder / "out", "--images", folder / "images", *options)


def test_captions_of_the_558k_list_keep_their_images_byte_for_byte(tmp_path):
    original = image(tmp_path / "images/00453/004539375.jpg")
    report = convert(tmp_path, [row("Describe.\n<image>", "a cat", id="004539375", image="00453/004539375.jpg")])
    (found,) = samples_in(tmp_path / "out/train/conversations-*.tar")
    assert found["members"]["0.jpg"] == original and found["turns"] == ["<image>\nDescribe.", "a cat"]
    assert (found["id"], found["kind"], found["files"]) == ("004539375", "image", ["00453/004539375.jpg"])
    assert report["notes"] == {"<image> moved to the front of its turn": 1}


def test_the_mix_with_text_only_and_multi_image_rows_is_read_back_by_the_loader(tmp_path):
    for name in ("coco/train2017/1.jpg", "gqa/images/2.jpg"):
        image(tmp_path / "images" / name)
    rows = [
        row("<image>\nWhat is it?", "A dog.", "Where?", "Here.", id="a", image="coco/train2017/1.jpg"),
        row("Tell a joke.", "No.", id="b"),
        row("First <image>, then <image>: what changed?", "all", id="c", image=["coco/train2017/1.jpg", "gqa/images/2.jpg"]),
    ]
    report = convert(tmp_path, rows)
    assert report["kinds"] == {"coco": 2, "text": 1} and not report["left_out"] and not report["notes"]
    batch = loaded(str(tmp_path / "out/train"))
    assert [meta["id"] for meta in batch.meta] == ["a", "b", "c"]
    assert len(batch.images) == 3
    assert [len(turns) for turns in batch.conversations] == [4, 2, 2]


def test_json_lines_and_their_broken_line(tmp_path):
    image(tmp_path / "1.png", kind="PNG")
    lines = [json.dumps(row("<image>\nWhat?", "that", id=n, image="1.png")) for n in range(3)]
    lines[1] = lines[1][:30]
    (tmp_path / "list.jsonl").write_text("\n\n".join(lines) + "\n")
    report = convert_with(llava_json, tmp_path / "list.jsonl", tmp_path / "out")  # images beside the list
    assert report["samples"] == {"train/conversations": 2}
    assert report["reasons"] == {"json cannot be parsed": 1} and list(report["left_out_items"]) == ["row 1"]


@pytest.mark.parametrize("first", ["[1, 2]", "null", '"text"', "7", "{broken", "[" * 2000 + "]" * 2000])
def test_a_bad_first_line_costs_itself(tmp_path, first):
    image(tmp_path / "1.png", kind="PNG")
    (tmp_path / "list.jsonl").write_text(f"{first}\n{json.dumps(row('What?', 'that', image='1.png'))}\n")
    report = convert_with(llava_json, tmp_path / "list.jsonl", tmp_path / "out")
    assert report["samples"] == {"train/conversations": 1} and list(report["left_out_items"]) == ["row 0"]


@pytest.mark.parametrize("text", ["[\n%s,\n%s\n]", "[%s,\n%s]", "\n[ %s\n,\n%s]\n", "%s\r\n\r\n%s", "[%s,%s]", "  %s\n%s"])
def test_a_list_is_told_from_lines(tmp_path, text):
    rows = [json.dumps(row("What?", "that"), indent=1 if text.startswith("[\n") else None) for _ in range(2)]
    (tmp_path / "list.json").write_text(text % tuple(rows), newline="")
    assert convert_with(llava_json, tmp_path / "list.json", tmp_path / "out")["samples"] == {"train/conversations": 2}


@pytest.mark.parametrize(
    ("asked", "images", "expected"),
    [
        (["What?"], 1, ["<image>\nWhat?"]),
        (["What?", "And here? <image>"], 2, ["<image>\nWhat?", "And here? <image>"]),
        (["What?", "<image> And here?"], 1, ["What?", "<image>\nAnd here?"]),
        (["<image><image> Which?"], 2, ["<image><image> Which?"]),
        (["Hello."], 0, ["Hello."]),
    ],
)
def test_markers_are_brought_in_line_with_the_images(asked, images, expected):
    turns = [turn for text in asked for turn in ({"role": "user", "text": text}, {"role": "assistant", "text": "yes"})]
    conversation, _ = reconcile(turns, images)
    assert [turn["text"] for turn in conversation if turn["role"] == "user"] == expected


def test_markers_outside_of_user_turns_do_not_count():
    said = (("assistant", "Hi."), ("user", "What?"), ("assistant", "<image> a cat"))
    turns = [{"role": role, "text": text} for role, text in said]
    conversation, repairs = reconcile(turns, 1)
    assert [turn["text"] for turn in conversation] == ["<image>\nWhat?", "a cat"]
    assert len(repairs) == 3


def test_more_markers_than_images_cannot_be_repaired():
    turns = [{"role": "user", "text": "<image> and <image>"}, {"role": "assistant", "text": "yes"}]
    with pytest.raises(BadSampleError, match="more markers than images: 2 <image>, 1 images"):
        reconcile(turns, 1)


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path):
    whole = image(tmp_path / "images/good.jpg")
    (tmp_path / "images/cut.jpg").write_bytes(whole[:-40])
    (tmp_path / "secret.jpg").write_bytes(whole)
    (tmp_path / "images/zero.jpg").write_bytes(b"")
    names: list = ["good.jpg", "cut.jpg", "gone.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "zero.jpg"]
    names += [["good.jpg", "gone.jpg"], 7]
    rows = [row("<image>\nWhat?", "that", image=name) for name in names]
    rows += [row("<image>\nWhat?", image="good.jpg"), row("<image>", "a"), {"conversations": "no"}, [3]]
    report = convert(tmp_path, rows)
    assert report["samples"] == {"train/conversations": 1}
    once = ["more markers than images", "bad image name", "no question with an answer", "row is no object"]
    once.append("'conversations' is a str, a list of turns is needed")
    twice = ["damaged image", "missing image", "image outside of the folder"]
    assert report["reasons"] == dict.fromkeys(once, 1) | dict.fromkeys(twice, 2)
    assert not report["notes"] and report["left_out"] == len(rows) - 1
    assert report["left_out_items"]["row 2"] == "missing image: gone.jpg"


def test_images_may_be_shrunk_and_are_never_enlarged(tmp_path):
    image(tmp_path / "images/wide.jpg", (400, 200))
    small = image(tmp_path / "images/small.jpg", (40, 30))
    convert(tmp_path, [row("What?", "that", image="wide.jpg"), row("What?", "that", image="small.jpg")], "--image-size", 200)
    wide, kept = samples_in(tmp_path / "out/train/conversations-*.tar")
    assert Image.open(io.BytesIO(wide["members"]["0.jpg"])).size == (200, 100) and kept["members"]["0.jpg"] == small


def test_another_suffix_is_taken_and_the_content_decides_about_the_type(tmp_path):
    original = image(tmp_path / "images/ocr_vqa/1.png", kind="PNG")
    convert(tmp_path, [row("What?", "that", image="ocr_vqa/1.jpg")])
    (found,) = samples_in(tmp_path / "out/train/conversations-*.tar")
    assert found["members"]["0.png"] == original


def test_an_image_is_in_one_split_only(tmp_path):
    for number in range(30):
        image(tmp_path / f"images/{number}.jpg")
    convert(tmp_path, [row("What?", "that", image=f"{n % 30}.jpg") for n in range(60)], "--val-share", 0.4)
    files = {split: [row["files"][0] for row in samples_in(tmp_path / f"out/{split}/*.tar")] for split in ("train", "val")}
    assert len(files["train"]) + len(files["val"]) == 60 and 12 < len(files["val"]) < 40
    assert not set(files["train"]) & set(files["val"])


def test_a_stopped_conversion_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    rows = [row("What?", "that", image=f"{n}.jpg") for n in range(10)]
    for number in range(10):
        image(tmp_path / f"images/{number}.jpg")
    convert(tmp_path, rows, "--rows-per-shard", 3)
    (tmp_path / "out").rename(tmp_path / "whole")
    reading, calls = llava_json.image_members, []

    def interrupted(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return reading(*arguments, **named)

    monkeypatch.setattr(llava_json, "image_members", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, rows, "--rows-per-shard", 3)
    convert(tmp_path, rows, "--rows-per-shard", 3)
    assert len(calls) == 8 + 4  # the first six images are not read again
    assert same_files(tmp_path / "whole/train", tmp_path / "out/train") == 8


def test_a_conversion_stopped_in_its_first_shard_goes_on(tmp_path, monkeypatch):
    rows = [row("What?", "that", image="a.jpg")]
    image(tmp_path / "images/a.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(llava_json, "image_members", lambda *arguments, **named: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path, rows)
    (tmp_path / "out/train").mkdir(exist_ok=True)
    (tmp_path / "out/train/.conversations-000000.tar.partial").write_bytes(b"what a killed run leaves")
    assert convert(tmp_path, rows)["samples"] == {"train/conversations": 1}


def test_retry_writes_the_shards_again_whose_images_have_arrived(tmp_path):
    rows = [row("What?", "that", image=f"{n}.jpg") for n in range(4)]
    for number in (0, 1, 2):
        image(tmp_path / f"images/{number}.jpg")
    assert convert(tmp_path, rows, "--rows-per-shard", 2)["left_out"] == 1
    first = (tmp_path / "out/train/conversations-000000.tar").stat().st_mtime_ns
    image(tmp_path / "images/3.jpg")
    assert convert(tmp_path, rows, "--rows-per-shard", 2)["left_out"] == 1
    report = convert(tmp_path, rows, "--rows-per-shard", 2, "--retry")
    assert report["left_out"] == 0 and report["samples"] == {"train/conversations": 4}
    assert (tmp_path / "out/train/conversations-000000.tar").stat().st_mtime_ns == first


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "list.json: no such file"),
        ("", [], "the file is empty"),
        ("\n" * 5000 + "[{}]", [], "the first reason: row 0: 'conversations' is a NoneType"),
        ("[]", [], "the list is empty"),
        ("[{]", [], "cannot be parsed"),
        ("hello", [], "expected a JSON list of objects, or JSON Lines"),
        ('{\n"rows":\n[]\n}', [], "found one object"),
        ('[{"image": "1.jpg"}]', [], "nothing could be converted; the first reason: row 0: 'conversations' is a NoneType"),
        ("[{}]", ["--images", "nowhere"], "--images: nowhere: no such folder"),
        ("[{}]", ["--image-size", "0"], "--image-size: found 0"),
        ("[{}]", ["--val-share", "1"], "--val-share: found 1,"),
    ],
)
def test_user_errors_are_one_line(tmp_path, capsys, content, options, message):
    if content is not None:
        (tmp_path / "list.json").write_text(content)
    assert message in error_of(llava_json, [tmp_path / "list.json", tmp_path / "out", *options], capsys)


@pytest.mark.parametrize(
    ("media", "reason"),
    [
        ({"video": "a.mp4"}, "no 'image', but files under the key 'video'"),
        ({"videos": ["a"], "image": None}, "no 'image', but files under the key 'videos'"),
        ({"img": "a.jpg"}, "no 'image', but files under the key 'img'"),
        ({"left": "photos/a.JPEG"}, "no 'image', but files under the key 'left'"),
        ({"views": [{"path": "a.png"}]}, "no 'image', but files under the key 'views'"),
        ({"video_id": "v1"}, "no 'image', but files under the key 'video_id'"),
        ({"image": "a.jpg", "video_path": "b"}, "not of images alone"),
        ({"image": "a.jpg", "images": ["b.jpg"]}, "both 'image' and 'images', which name different files"),
    ],
)
def test_rows_of_another_medium_or_key_are_no_texts(tmp_path, media, reason):
    image(tmp_path / "images/a.jpg")
    plain = row("Why?", "so", video=None, images=[], source="a book", image_id=7)
    report = convert(tmp_path, [row("What?", "that", **media), plain])
    assert report["kinds"] == {"text": 1} and report["reasons"] == {reason: 1}


@pytest.mark.parametrize(
    ("own", "kind", "task"),
    [
        ({"kind": "exists"}, "exists", "conversation"),
        ({"kind": " exists ", "task": "questions"}, "exists", "questions"),
        ({"kind": ""}, "coco", "conversation"),
        ({"kind": None, "task": 3}, "coco", "conversation"),
        ({"kind": "a name that is too long for the records of a metric"}, "coco", "conversation"),
    ],
)
def test_a_row_s_own_kind_is_kept(tmp_path, own, kind, task):
    image(tmp_path / "images/coco/a.jpg")
    convert(tmp_path, [row("What?", "yes", image="coco/a.jpg", **own)])
    (sample,) = samples_in(tmp_path / "out/train/*.tar")
    assert (sample["kind"], sample["task"]) == (kind, task)


def test_kinds_of_rows_reach_the_metric_that_counts_them(tmp_path):
    image(tmp_path / "images/coco/a.jpg")
    convert(tmp_path, [row("Is it?", answer, image="coco/a.jpg", kind="exists") for answer in ("yes", "no", "yes")])
    metric, batch = YesNo(), loaded(str(tmp_path / "out/train"))
    metric.update(Outputs(answers=["yes", "yes", "yes"]), batch)
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)


def test_an_image_of_another_suffix_is_not_taken_from_the_row_that_names_it(tmp_path):
    image(tmp_path / "images/a.png", kind="PNG")
    image(tmp_path / "images/b.JPG")
    for kind in ("gif", "webp"):
        image(tmp_path / f"images/c.{kind}", kind=kind.upper())
    report = convert(tmp_path, [row("What?", "that", image=name) for name in ("a.jpg", "a.png", "b.jpg", "c.jpg")])
    assert report["left_out_items"] == {
        "row 0": "missing image: a.jpg; a.png is another row's",
        "row 3": "missing image: c.jpg; there are c.webp, c.gif",
    }
    assert report["notes"]["image of another suffix taken than the one named"] == 1


def test_turns_of_parts_are_read_and_parts_with_images_of_their_own_are_not(tmp_path):
    image(tmp_path / "images/a.jpg")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]}
    parts = [{"type": "image"}, {"type": "image", "image": "b.jpg"}, {"type": "video"}, 3]
    asked = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]} for part in parts]
    rows = [{"image": "a.jpg", "conversations": [turn, answer]} for turn in asked]
    report = convert(tmp_path, rows)
    (sample,) = samples_in(tmp_path / "out/train/*.tar")
    assert sample["turns"] == ["<image>\nWhat?", "A cup."] and report["reasons"] == {"part of a turn that cannot be read": 3}


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    text = json.dumps([row("What?", "that", score=0.5)]).replace("0.5", '1e999, "other": NaN, "third": 0.5')
    (tmp_path / "list.json").write_text(text)
    convert_with(llava_json, tmp_path / "list.json", tmp_path / "out")
    (sample,) = samples_in(tmp_path / "out/train/*.tar")
    assert (sample["score"], sample["other"], sample["third"]) == (None, None, 0.5)
