"""Sizes of images and lengths of texts in an index: by headers alone, upright, whoever wrote the tar."""

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image, ImageFile
from test_shards import data_of, png, sample, write_tar

from data_pipelines.decoding import decode_image, decoded, open_image
from data_pipelines.index import main, parser
from data_pipelines.shards import index
from data_pipelines.shards.index import load_index
from data_pipelines.shards.sources import ShardSource
from data_pipelines.transforms.resize import Squeeze
from umm_zoo.errors import UserError
from umm_zoo.experiment.reach import untouched


def encoded(kind: str, size: tuple[int, int], orientation: int = 1, **options) -> bytes:
    image, file = Image.new("RGB", size, "teal"), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file, kind, **({"exif": exif.tobytes()} if orientation > 1 else {}), **options)
    return file.getvalue()


def behind_its_pixels(content: bytes) -> bytes:
    """A PNG whose EXIF block stands at its end, as some writers put it."""
    start = content.index(b"eXIf") - 4
    chunk = content[start : start + 12 + int.from_bytes(content[start : start + 4], "big")]
    rest = content[:start] + content[start + len(chunk) :]
    return rest[:-12] + chunk + rest[-12:]


def rows(tar) -> list[tuple[list[tuple[int, int]], int]]:
    """Sizes of images and length of the text of every sample, as the index has them."""
    read = load_index(str(tar)).measures()
    ends = [*read.starts[1:], len(read.widths)]
    sizes = list(zip(read.widths.tolist(), read.heights.tolist(), strict=True))
    return [(sizes[a:b], int(length)) for a, b, length in zip(read.starts, ends, read.lengths, strict=True)]


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_those_of_the_decoded_image(tmp_path, kind, orientation):
    content = encoded(kind, (30, 14), orientation)
    with open_image(content) as image:
        expected = decoded(image).size
    write_tar(tmp_path / "a.tar", {"k": {"jpg": content}})
    assert rows(tmp_path / "a.tar") == [([expected], 0)]
    assert expected == ((14, 30) if orientation >= 5 else (30, 14))


def test_an_orientation_behind_the_pixels_counts(tmp_path):
    write_tar(tmp_path / "a.tar", {"k": {"png": behind_its_pixels(encoded("PNG", (30, 14), 6))}})
    assert rows(tmp_path / "a.tar") == [([(14, 30)], 0)]


def test_images_stand_in_the_order_of_members_and_damaged_ones_have_no_size(tmp_path):
    samples = {
        "a": {"target.png": encoded("PNG", (5, 9)), "json": b"{}", "1.jpg": encoded("JPEG", (7, 8)), "0.png": png(1)[:20]},
        "b": {"txt": "  Zwölf Wörter?\n".encode()},
        "c": {"jpg": b"", "depth.npy": b"1"},
    }
    write_tar(tmp_path / "a.tar", samples)
    assert rows(tmp_path / "a.tar") == [([(5, 9), (7, 8), (0, 0)], 0), ([], 13), ([(0, 0)], 0)]


@pytest.mark.parametrize(
    ("members", "length"),
    [
        ({"json": json.dumps({"conversations": [{"from": "human", "value": "abc"}, {"from": "gpt", "value": "é" * 4}]})}, 7),
        ({"json": json.dumps({"conversations": [{"role": "user", "content": ["ab", {"type": "text", "text": "c"}]}]})}, 4),
        ({"json": json.dumps({"caption": "other"}), "txt": "four"}, 4),
        ({"json": json.dumps({"conversations": [{"role": "user", "text": "abc"}]}), "txt": "is not looked at"}, 3),
        ({"txt": "ab", "long.txt": "cde"}, 5),
        ({"json": '{"conversations": ' + "[" * 100_000}, 0),
        ({"json": '{"conversations": 3}', "txt": "abc"}, 0),
        ({"txt": b"\xff\xfe\xff"}, 0),
        ({"txt": "a" * 2_000_000}, 0),
    ],
)
def test_lengths_are_those_of_what_a_task_reads(tmp_path, members, length):
    content = {name: text if isinstance(text, bytes) else text.encode() for name, text in members.items()}
    write_tar(tmp_path / "a.tar", {"k": content})
    assert rows(tmp_path / "a.tar") == [([], length)]


def test_nothing_is_decoded(tmp_path, monkeypatch):
    cut = encoded("JPEG", (640, 480), 6, quality=95)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    write_tar(tmp_path / "a.tar", {"k": {"jpg": cut[: len(cut) // 2]}})
    assert rows(tmp_path / "a.tar") == [([(480, 640)], 0)]


def former(tar) -> None:
    """Make the index of a tar one of the version before, with the tar's time as that had."""
    place, time = f"{tar}.index.json", os.stat(tar).st_mtime_ns
    content = json.loads(Path(place).read_text())
    for name in ("measured", "widths", "heights", "lengths"):
        del content[name]
    Path(place).write_text(json.dumps({**content, "version": 2}, separators=(",", ":")))
    os.utime(place, ns=(time, time))
    index._kept_columns.cache_clear()


@pytest.fixture
def old(tmp_path):
    write_tar(tmp_path / "a.tar", {f"k{n}": sample(n) for n in range(4)})
    data_of(tmp_path / "a.tar").check()
    former(tmp_path / "a.tar")
    return tmp_path / "a.tar"


def test_an_index_of_the_version_before_is_read_and_left_alone(old):
    before = (old.parent / "a.tar.index.json").read_bytes()
    loader = iter(data_of(old, batch_size=4).train_dataloader())
    assert len(set(next(loader).keys)) == 4
    assert (old.parent / "a.tar.index.json").read_bytes() == before and not load_index(str(old)).measured


def test_it_is_made_again_by_the_first_who_needs_measures_with_one_note(old, capsys):
    write_tar(old.parent / "b.tar", {"m": sample(5)})
    load_index(str(old.parent / "b.tar"))
    former(old.parent / "b.tar")
    source = ShardSource(str(old.parent))
    for _ in range(2):
        assert all(shard.measures().lengths.tolist() for shard in source.open("own", measured=True).indexes)
    assert capsys.readouterr().err.count("note: source 'own'") == 1
    assert rows(old)[2] == ([(8, 8)], len("<image>\nWhich?") + 1)


def test_it_is_not_made_again_for_another_tar(old):
    write_tar(old, {f"k{n}": sample(n + 1) for n in range(4)})
    with pytest.raises(UserError, match="not what its index was made for"):
        load_index(str(old), print)


@pytest.mark.parametrize("missing", [[], ["--missing"]])
def test_the_command_makes_it_again(old, missing):
    main(parser().parse_args([str(old), *missing]))
    assert load_index(str(old)).measured


def test_where_nothing_may_be_written_beside_the_new_index_lies_in_the_cache(old, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    before = (old.parent / "a.tar.index.json").read_bytes()
    with untouched():
        places = {load_index(str(old), print).place for _ in range(2)}
    assert capsys.readouterr().out == "\n" and len(places) == 1 and places.pop().startswith(str(tmp_path / "user"))
    assert (old.parent / "a.tar.index.json").read_bytes() == before


LIES = {
    "a size too few": lambda c: c | {"widths": c["widths"][1:]},
    "sizes below 0": lambda c: c | {"heights": [-1] * 4},
    "sizes beyond any image": lambda c: c | {"heights": [2**40] * 4},
    "lengths as text": lambda c: c | {"lengths": ["9"] * 4},
    "another length": lambda c: c | {"lengths": [9, *c["lengths"][1:]]},
    "no measures": lambda c: {name: value for name, value in c.items() if name != "widths"},
    "another digest": lambda c: c | {"measured": "0" * 64},
}


@pytest.mark.parametrize("lie", LIES)
def test_measures_that_lie_are_one_line_for_those_who_need_them_and_nothing_for_others(tmp_path, lie):
    write_tar(tmp_path / "a.tar", {f"k{n}": sample(n) for n in range(4)})
    load_index(str(tmp_path / "a.tar"))
    place = tmp_path / "a.tar.index.json"
    place.write_text(json.dumps(LIES[lie](json.loads(place.read_text())), separators=(",", ":")))
    index._kept_columns.cache_clear()
    shard = load_index(str(tmp_path / "a.tar"), print)
    assert len(shard.members(3)) == 2
    with pytest.raises(UserError, match=r"a\.tar.*: .*data_pipelines\.index .*a\.tar` makes a new index") as caught:
        shard.measures()
    assert "\n" not in str(caught.value)


def test_an_exif_block_behind_the_pixels_changes_nothing_of_a_decoded_image():
    content = encoded("PNG", (30, 14), 6)
    assert (decode_image(content, 8, Squeeze()) == decode_image(behind_its_pixels(content), 8, Squeeze())).all()
