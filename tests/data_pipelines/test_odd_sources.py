"""Sources as strangers write them: each odd thing ends as a sample that the loader reads alike, or as a counted, named reason."""

import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from converter_parts import convert, error_of, loaded, parquet_of, photo, read_tar, samples_in
from PIL import Image
from test_shards import add

from data_pipelines.converters import blip3o, coco, editing, image_folder, img2dataset, llava_json, table
from data_pipelines.decoding import BadSampleError, decode_image
from data_pipelines.tasks import Conversations, TextToImage
from data_pipelines.transforms.resize import Square
from umm_zoo.batch import stacked
from umm_zoo.errors import UserError

RANDOM = np.random.default_rng(0)
RGB = Image.fromarray(RANDOM.integers(0, 256, (20, 30, 3), dtype=np.uint8))
GREY = Image.fromarray(RANDOM.integers(0, 300, (20, 30)).astype(np.uint16))
EXIF = Image.Exif()
EXIF[0x0112] = 6


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


FILES = {
    "rgb.png": encoded(RGB, "PNG"),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "moves.gif": encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(180)]),
    "moves.webp": encoded(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)]),
    "one_bit.png": encoded(RGB.convert("1"), "PNG"),
    "grey16.png": encoded(GREY, "PNG"),
    "grey16.tif": encoded(GREY, "TIFF"),
    "palette.png": encoded(RGB.convert("P"), "PNG", transparency=0),
    "turned.jpg": encoded(RGB, "JPEG", exif=EXIF),
    "turned.webp": encoded(RGB, "WEBP", exif=EXIF),
    "pixel.png": encoded(RGB.crop((0, 0, 1, 1)), "PNG"),
    "two.mpo": encoded(RGB, "MPO", save_all=True, append_images=[RGB]),
    "named_otherwise.jpg": encoded(RGB, "PNG"),
    "photo.jp2": encoded(RGB, "JPEG2000"),
    "photo.ppm": encoded(RGB, "PPM"),
    "photo.jfif": encoded(RGB, "JPEG"),
    "cut.jpg": encoded(RGB, "JPEG")[:-200],
    "page.jpg": b"<html>not found</html>",
    "nothing.jpg": b"",
}
BAD = {"cut.jpg", "page.jpg", "nothing.jpg"}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "that"}]


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


def of_llava(folder: Path) -> dict:
    write_images(folder / "in")
    (folder / "list.json").write_text(json.dumps([{"id": name, "image": name, "conversations": TURNS} for name in FILES]))
    return convert(llava_json, folder / "list.json", folder / "out", "--images", folder / "in")


def of_edits(folder: Path) -> dict:
    write_images(folder / "in")
    rows = [{"input": "rgb.png", "instruction": "Do.", "output": name, "id": name} for name in FILES]
    (folder / "list.json").write_text(json.dumps(rows))
    return convert(editing, folder / "list.json", folder / "out", "--images", folder / "in")


def of_folder(folder: Path) -> dict:
    write_images(folder / "in/cat")
    (folder / "in/dog").mkdir()
    (folder / "in/dog/d.png").write_bytes(photo(kind="PNG"))
    return convert(image_folder, folder / "in", folder / "out", "--val-share", 0)


def of_tars(folder: Path, command=blip3o) -> dict:
    (folder / "in").mkdir()
    with tarfile.open(folder / "in/0.tar", "w") as tar:
        for name, content in FILES.items():
            stem, _, suffix = name.partition(".")
            add(tar, f"{stem}-{suffix}.{suffix}", content)
            add(tar, f"{stem}-{suffix}.txt", name.encode())
    return convert(command, folder / "in", folder / "out")


def of_parquet(folder: Path) -> dict:
    parquet_of(folder / "in/0.parquet", image=list(FILES.values()), text=["text"] * len(FILES), id=list(FILES))
    return convert(table, folder / "in", folder / "out")


def of_coco(folder: Path) -> dict:
    write_images(folder / "in/val")
    images = [{"id": number, "file_name": name} for number, name in enumerate(FILES)]
    lists = {"images": images, "annotations": [{"image_id": number, "caption": "text"} for number in range(len(FILES))]}
    (folder / "in/captions_val.json").write_text(json.dumps(lists))
    return convert(coco, folder / "in", folder / "out")


SOURCES = {
    "llava_json": of_llava,
    "editing": of_edits,
    "image_folder": of_folder,
    "blip3o": of_tars,
    "img2dataset": lambda folder: of_tars(folder, img2dataset),
    "table": of_parquet,
    "coco": of_coco,
}


def pixels(content: bytes) -> np.ndarray | None:
    try:
        return decode_image(content, 16, Square())
    except BadSampleError:
        return None


@pytest.mark.parametrize("source", SOURCES)
def test_every_converter_takes_the_images_that_the_loader_takes_with_the_same_pixels(tmp_path, source):
    report = SOURCES[source](tmp_path)
    found: dict[str, bytes] = {}
    for path in tmp_path.rglob("out/**/*.tar"):
        for _, members in read_tar(path):
            row = json.loads(members["json"])
            name = row.get("id") or row.get("file", "").removeprefix("cat/") or row["conversations"][-1]["text"]
            found[name] = next(members[kind] for kind in sorted(members, reverse=True) if kind != "json")
    found.pop("dog/d.png", None)
    assert set(found) == FILES.keys() - BAD == {name for name, content in FILES.items() if pixels(content) is not None}
    for name, content in found.items():
        np.testing.assert_array_equal(pixels(content), pixels(FILES[name]), err_msg=name)
    assert report["reasons"]["damaged image"] == len(BAD) * (2 if source == "image_folder" else 1)


@pytest.mark.parametrize("name", sorted(FILES.keys() - BAD - {"two.mpo"}))
def test_a_pair_in_place_is_one_for_the_loader_where_the_converter_takes_it(tmp_path, name):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, f"a.{name.partition('.')[2]}", FILES[name])
        add(tar, "a.txt", b"text")
    assert stacked(loaded(str(tmp_path / "0.tar"), TextToImage()).requested).shape == (1, 3, 8, 8)


def llava(folder: Path, *rows: dict) -> dict:
    (folder / "a.jpg").write_bytes(photo())
    (folder / "list.json").write_text(json.dumps([{"image": "a.jpg", "conversations": TURNS}, *rows]))
    return convert(llava_json, folder / "list.json", folder / "out")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


@pytest.mark.parametrize("answer", ["", " ", "\n\t", "\u00a0", "<image>"])
def test_an_answer_of_blanks_is_left_out_by_converter_and_loader(tmp_path, answer):
    several = turns("What?", answer, "And?", "that")
    report = llava(tmp_path, {"conversations": turns("What?", answer)}, {"conversations": several})
    assert report["reasons"] == {"empty answer": 2} and report["converted"] == {"train/conversations": 1}
    content = json.dumps({"conversations": turns("What?", answer.replace("<image>", ""))}).encode()
    with pytest.raises(BadSampleError, match="empty answer"):
        Conversations()("key", {"json": content})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<video>\nWhat?", "<video>"),
        ("What?\n <video>", "<video>"),
        ("What is heard? <audio>", "<audio>"),
        ("<point_cloud>\nWhat?", "<point_cloud>"),
        ("How do I use <video> in HTML?", ""),
        ("<video>\n<source src=a>\n</video>\nWhat is wrong?", ""),
        ("<b>What?</b>", ""),
    ],
)
def test_a_marker_of_another_medium_is_no_text(tmp_path, text, reason):
    report = llava(tmp_path, {"conversations": turns(text, "that")})
    assert report["left_out_items"] == ({"row 1": f"not of images alone: {reason} in a turn"} if reason else {})


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(("command", "key"), [(llava_json, "data"), (editing, "annotations")])
def test_a_list_inside_of_an_object_is_named(tmp_path, capsys, indent, command, key):
    (tmp_path / "list.json").write_text(
        json.dumps({"version": 1, key: [{"image": "a.jpg", "conversations": TURNS}] * 3}, indent=indent)
    )
    line = error_of(command, [tmp_path / "list.json", tmp_path / "out"], capsys)
    assert f"list.json: found one object with a list of 3 under '{key}', expected a JSON list of objects" in line
    assert line.endswith(f"`jq .{key} list.json` gives the list")


def test_archives_beside_tars_are_read_or_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("0.tar", "1.tar.gz", "2.tgz", "3.tar.xz"):
        with tarfile.open(tmp_path / "in" / name, f"w:{name[-2:].replace('ar', '')}") as tar:
            add(tar, "a.jpg", photo())
            add(tar, "a.txt", b"text")
    for name in ("4.tar.zst", "5.zip", "._6.tar", "README.md"):
        (tmp_path / "in" / name).write_bytes(b"x")
    report = convert(blip3o, tmp_path / "in", tmp_path / "out")
    assert report["samples"]["train/text_to_image"] == 4
    assert report["reasons"] == {"an archive that is no tar, or of a compression that is not read": 2, "hidden file": 1}
    with pytest.raises(UserError, match="3 of 4 tars could not be indexed"):
        convert(blip3o, tmp_path / "in", "--in-place")
    assert "not indexed: 5.zip (an archive that is no tar" in capsys.readouterr().out


def test_every_row_that_is_left_out_is_an_item_of_the_report(tmp_path, capsys):
    for name in ("cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/.x.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"" if name == "cat/b.jpg" else photo())
    report = convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    assert len(report["left_out_items"]) == report["left_out"] == sum(report["reasons"].values()) == 3
    assert "left out: 3 (each with its reason" in capsys.readouterr().out


def test_edits_under_unknown_keys_name_the_options(tmp_path, capsys):
    (tmp_path / "list.json").write_text(json.dumps([{"src": "a.jpg", "text": "Do.", "out": "b.jpg"}]))
    line = error_of(editing, [tmp_path / "list.json", tmp_path / "out"], capsys)
    assert line.endswith("no input image: the row has src, text, out; --input, --instruction and --target name the keys")


@pytest.mark.parametrize("nested", [False, True])
def test_an_image_of_another_suffix_is_not_taken_where_a_row_of_a_table_names_it(tmp_path, nested):
    for name in ("1.png", "2.png", "a.jpg"):
        (tmp_path / name).write_bytes(photo(kind="PNG"))
    names = ["1.jpg", "1.png", "2.jpg"]
    inputs = [{"bytes": None, "path": name} for name in names] if nested else names
    parquet_of(tmp_path / "t.parquet", input=inputs, instruction=["Do."] * 3, output=["a.jpg"] * 3)
    report = convert(editing, tmp_path / "t.parquet", tmp_path / "out", "--images", tmp_path)
    assert report["left_out_items"] == {"row 0": "missing image: 1.jpg; 1.png is another row's"}
    assert report["notes"] == {"image of another suffix taken than the one named": 1}


@pytest.mark.parametrize(("written", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_both_normal_forms_of_a_name_are_one_file(tmp_path, written, there):
    (tmp_path / unicodedata.normalize(there, "caf\xe9.jpg")).write_bytes(photo(9))
    report = llava(tmp_path, {"image": unicodedata.normalize(written, "caf\xe9.jpg"), "conversations": TURNS})
    assert not report["left_out"] and samples_in(tmp_path / "out/train/*.tar")[1]["members"]["0.jpg"] == photo(9)


def test_folders_of_one_name_are_one_class_and_links_are_followed_or_counted(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / "in" / unicodedata.normalize(form, "caf\xe9")).mkdir(parents=True)
        (tmp_path / "in" / unicodedata.normalize(form, "caf\xe9") / "1.jpg").write_bytes(photo())
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/1.jpg").write_bytes(photo())
    for link, target in (("tea", "elsewhere"), ("tea/more", "elsewhere/deep"), ("tea/1", "elsewhere/1.jpg"), ("tea/2.jpg", "gone")):
        os.symlink(tmp_path / target, tmp_path / "in" / link)
    report = convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    assert {row["class"] for row in samples_in(tmp_path / "out/train/captions-*.tar")} == {"caf\xe9", "tea"}
    more = {
        "tea/more": "link to a folder, which is not followed",
        "tea/1": "no image by its suffix ''",
        "tea/2.jpg": "no plain file",
    }
    assert report["left_out_items"] == more and report["converted"]["train/captions"] == 3
