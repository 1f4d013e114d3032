import json
import tarfile
from pathlib import Path

import pytest
from converter_parts import convert, error_of, loaded, photo, read_tar, samples_in
from test_shards import add, write_tar

from data_pipelines.converters import blip3o
from data_pipelines.tasks import TextToImage
from umm_zoo.batch import stacked


def pairs(folder: Path, tars: int = 2, each: int = 3) -> None:
    for number in range(tars):
        rows = {f"{number}{n}": {"jpg": photo(10 * number + n), "txt": f"text {number}{n}".encode()} for n in range(each)}
        write_tar(folder / f"sa_{number:06d}.tar", rows)


def test_pairs_become_prompts_with_an_image_to_generate_byte_for_byte(tmp_path):
    pairs(tmp_path / "in")
    convert(blip3o, tmp_path / "in", tmp_path / "out")
    batch = loaded(str(tmp_path / "out/train"))
    assert [turns[0]["text"] for turns in batch.conversations] == [f"text {n}{p}" for n in range(2) for p in range(3)]
    assert stacked(batch.requested).shape == (6, 3, 8, 8) and [meta["origin"] for meta in batch.meta][3] == "sa_000001.tar/10"
    found = {key: members for path in sorted((tmp_path / "out/train").glob("*.tar")) for key, members in read_tar(path)}
    assert found["000001-00000002"]["target.jpg"] == photo(12)
    assert json.loads((tmp_path / "out/report.json").read_text())["samples"] == {"train/text_to_image": 6}


def test_in_place_nothing_is_copied_and_the_tars_can_be_trained_on(tmp_path, capsys):
    pairs(tmp_path / "in")
    write_tar(tmp_path / "in/odd.tar", {"a": {"jpg": photo()}, "b": {"txt": b"alone"}, "c": {"jpg": photo(), "txt": b"both"}})
    convert(blip3o, tmp_path / "in", "--in-place")
    assert "3 tars indexed, 7 pairs" in (printed := capsys.readouterr().out) and "odd.tar/a, odd.tar/b" in printed
    assert sorted(path.suffix for path in (tmp_path / "in").iterdir()) == [".json"] * 3 + [".tar"] * 3
    batch = loaded(str(tmp_path / "in/sa_{000000..000001}.tar"), TextToImage())
    assert len(batch.requested) == 6


def test_as_captions_the_text_is_the_answer(tmp_path):
    pairs(tmp_path / "in", 1, 1)
    convert(blip3o, tmp_path / "in", tmp_path / "out", "--task", "captions")
    batch = loaded(str(tmp_path / "out/train"))
    assert batch.answers() == ["text 00"] and batch.conversations[0][0]["text"] == "<image>\nDescribe the image."


def test_bad_pairs_are_left_out_and_a_cut_tar_gives_what_it_has(tmp_path):
    rows = {"a": {"jpg": photo(1), "txt": b"one"}, "b": {"jpg": photo()[:200], "txt": b"two"}, "c": {"txt": b"three"}}
    rows |= {"d": {"jpg": photo(), "txt": b"  "}, "e": {"jpg": photo(5)}, "f": {"jpg": photo(6), "txt": b"\xff\xfe"}}
    write_tar(tmp_path / "in/0.tar", rows | {"g": {"jpg": photo(7), "txt": b"a <image> of seven"}})
    write_tar(tmp_path / "in/1.tar", {str(n): {"jpg": photo(n), "txt": b"t"} for n in range(9)})
    whole = (tmp_path / "in/1.tar").read_bytes()
    (tmp_path / "in/1.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/2.tar").write_bytes(b"")
    (tmp_path / "in/3.tar").write_bytes(b"no tar at all" * 100)
    report = convert(blip3o, tmp_path / "in", tmp_path / "out")
    once = dict.fromkeys(("damaged image", "missing image", "empty text", "no text", "text is not UTF-8"), 1)
    assert report["reasons"] == once | {"tar cannot be read to its end": 3}
    assert report["left_out_items"]["0.tar/c"] == "missing image: found txt"
    assert report["notes"] == {"<image> removed from a text": 1}
    assert report["samples"] == {"train/text_to_image": 2 + 6}


def test_names_that_lead_elsewhere_and_links_write_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/0.tar", "w") as file:
        add(file, "../../evil.jpg", photo())
        add(file, "../../evil.txt", b"text")
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    convert(blip3o, tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    ((key, members),) = read_tar(tmp_path / "out/train/text_to_image-000000.tar")
    assert key == "000000-00000000" and json.loads(members["json"])["origin"] == "0.tar/../../evil"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere: no shard (*.tar) found there"),
        (["empty", "out"], "empty: no tar file in this folder"),
        (["in"], "OUT: give either a folder to write into, or --in-place"),
        (["in", "out", "--in-place"], "OUT: give either"),
        (["in", "out", "--image-size", "-1"], "--image-size: found -1"),
        (["in", "out/file"], "out/file: found a file, expected a folder"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path / "in", 1, 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    assert message in error_of(blip3o, arguments, capsys)


@pytest.mark.parametrize("compressed", ["", "gz"])
def test_members_in_any_order_and_names_with_dots_find_their_pair(tmp_path, compressed):
    (tmp_path / "in").mkdir()
    names = ["a.1", "a.2", "b/a.1", "IMG 20.03.2021"]
    with tarfile.open(tmp_path / "in/0.tar", f"w:{compressed}") as file:
        for place, name in enumerate(names):
            add(file, f"{name}.jpg", photo(place))
        for name in reversed(names):
            add(file, f"{name}.txt", f"text of {name}".encode())
    report = convert(blip3o, tmp_path / "in", tmp_path / "out")
    assert report["samples"] == {"train/text_to_image": 4} and not report["left_out"]
    found = samples_in(tmp_path / "out/train/*.tar")
    assert [(row["turns"], row["members"]["target.jpg"]) for row in found] == [
        ([f"text of {name}"], photo(place)) for place, name in enumerate(names)
    ]


@pytest.mark.parametrize("damage", ["header", "cut between", "two tars", "no end"])
def test_a_tar_that_does_not_end_as_one_is_said(tmp_path, damage):
    pairs(tmp_path / "in", 1)
    path = tmp_path / "in/sa_000000.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as file:
        last, end = file.getmember("02.jpg").offset, file.getmember("02.txt").offset_data + 512
    if damage == "header":
        content[last + 20 : last + 200] = b"x" * 180
    content = {"cut between": content[:last], "two tars": content * 2, "no end": content[:end]}.get(damage, content)
    path.write_bytes(content)
    report = convert(blip3o, tmp_path / "in", tmp_path / "out")
    assert report["reasons"] == {"tar cannot be read to its end": 1}
    assert report["samples"]["train/text_to_image"] == (3 if damage in ("two tars", "no end") else 2)


def test_names_that_are_not_utf_8_are_converted_and_escaped(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/0.tar", "w", encoding="utf-8", errors="surrogateescape") as file:
        add(file, "caf\udce9.jpg", photo(1))
        add(file, "caf\udce9.txt", b"coffee")
        add(file, "caf\udce9.\udce9", b"")
        add(file, "\x1b[31merror.jpg", photo(2))
    report = convert(blip3o, tmp_path / "in", tmp_path / "out")
    (row,) = samples_in(tmp_path / "out/train/*.tar")
    assert row["origin"] == "0.tar/caf\\udce9" and list(report["left_out_items"]) == ["0.tar/\\x1b[31merror"]
    assert report["notes"] == {"member .\\udce9 that is not converted": 1}


def test_in_place_the_reasons_are_counted_and_a_bad_tar_does_not_stop_the_others(tmp_path, capsys):
    pairs(tmp_path / "in", 1)
    samples = {
        "a": {"jpg": photo(), "1.jpg": photo(), "1.txt": b"x", "txt": b"y"},
        "b": {"jpg": photo(), "png": photo(), "txt": b"z"},
    }
    write_tar(tmp_path / "in/odd.tar", samples)
    (tmp_path / "in/none.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="1 of 3 tars could not be indexed"):
        convert(blip3o, tmp_path / "in", "--in-place")
    printed = capsys.readouterr()
    assert "2 tars indexed, 3 pairs" in printed.out and "1 with dots" in printed.out and "1 with several images" in printed.out
    assert "none.tar" in printed.err
