import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from converter_parts import error_of
from PIL import Image
from test_ledger import BAD, sample
from test_shards import png, write_tar

import data_pipelines.inspect as inspect_command
from data_pipelines.inspect import inspect, main, parser
from umm_zoo.errors import UserError


def test_counts_sizes_and_texts_are_those_of_the_shards(tmp_path):
    wide = sample(1, **{"0.png": png(3, 16)})
    write_tar(tmp_path / "a.tar", {"k1": sample(22), "k2": wide, "bad": BAD["broken"][0]})
    found = inspect([str(tmp_path / "a.tar")], sheet=5)
    assert (found.samples, found.widths, found.heights) == (3, [8, 16], [8, 16])
    assert (found.prompts, found.replies) == ([14, 14], [2, 1])  # "<image>\nWhich?" and the numbers
    assert [name.split(":")[1] for name in found.bad] == ["bad"] and len(found.shown) == 2
    assert found.bytes == sum(len(content) for row in (sample(22), wide, BAD["broken"][0]) for content in row.values())


def test_the_sheet_shows_input_and_target_side_by_side(tmp_path):
    write_tar(tmp_path / "a.tar", {"k": sample(0, **{"target.png": png(200)})})
    main(parser().parse_args([str(tmp_path / "a.tar"), "--sheet", str(tmp_path / "sheet.png")]))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    black = np.argwhere((sheet == 0).all(axis=-1)).mean(axis=0)
    red = np.argwhere((sheet == [200, 0, 0]).all(axis=-1)).mean(axis=0)
    assert (red - black).tolist() == [0, 128 + 8]


@pytest.mark.parametrize("text", ["[/red] a [bold]cat", "\x1b[31merror: forged", "a\0b"])
def test_texts_are_printed_and_never_followed(tmp_path, capsys, text):
    write_tar(tmp_path / "a.tar", {"k": {"jpg": png(5), "txt": text.encode()}, "l\x1b[1m": {"txt": b"alone"}})
    main(parser().parse_args([str(tmp_path / "a.tar"), "--sheet", str(tmp_path / "sheet.png")]))
    printed = capsys.readouterr().out
    assert text.replace("\x1b", r"\x1b").replace("\0", r"\x00") in printed and not {"\x1b", "\0"} & set(printed)


def test_captions_of_others_are_understood(tmp_path):
    write_tar(tmp_path / "a.tar", {"k": {"jpg": png(5), "txt": "Un café.".encode(), "json": b'{"url": "x"}'}})
    assert inspect([str(tmp_path / "a.tar")]).answers == {"Un café.": 1}
    assert inspect([str(tmp_path / "a.tar")], generated=True).answers == {"": 1}


@pytest.mark.parametrize(("arguments", "message"), [(["none"], "none: no shard"), (["a.tar", "--every", "0"], "--every: found 0")])
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(inspect_command, arguments, capsys)


@pytest.mark.processes
def test_the_index_command_repairs_a_stale_index_and_names_what_it_cannot(tmp_path):
    write_tar(tmp_path / "a.tar", {"k": sample(1)})
    (tmp_path / "a.tar.index.json").write_text("{}")
    (tmp_path / "b.tar").write_text("no tar")
    command = [sys.executable, "-m", "data_pipelines.index", "a.tar", "b.tar"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": root, "HOME": str(tmp_path)})
    assert done.returncode == 2 and "a.tar.index.json: 1 samples" in done.stdout
    assert "error: b.tar: not a plain (uncompressed) tar file" in done.stderr and "Traceback" not in done.stderr
    assert inspect([str(tmp_path / "a.tar")]).samples == 1


def test_verify_compares_contents_with_their_indexes(tmp_path, capsys):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"k": sample(1)})
    shards = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    verify = [*shards, "--verify", "--sheet", str(tmp_path / "sheet.png")]
    main(parser().parse_args(verify))
    assert "2 shards are what their indexes were made for" in capsys.readouterr().out
    file, time = tmp_path / "b.tar", (tmp_path / "b.tar").stat()
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 9] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(time.st_atime_ns, time.st_mtime_ns))  # as a disk changes it: size and time are those of before
    with pytest.raises(UserError, match=r"b\.tar: found sha256 .*, for which its index was made; fetch it again"):
        main(parser().parse_args(verify))


def test_what_a_crop_would_lose_is_told_for_upright_images(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, width in enumerate((60, 90)):
        Image.new("RGB", (width, 30)).save(tmp_path / f"{number}.jpg", exif=exif)
    contents = {f"k{n}": {"jpg": (tmp_path / f"{n}.jpg").read_bytes(), "txt": b"A strip."} for n in (0, 1)}
    write_tar(tmp_path / "a.tar", contents)
    found = inspect([str(tmp_path / "a.tar")])
    assert (found.widths, found.heights) == ([30, 30], [60, 90])
    lost = inspect_command.cropped(found)
    np.testing.assert_allclose(lost["Square"], [1 / 2, 2 / 3], atol=1e-3)
    assert max(lost["Bucket (sides of 1/16)"]) < 0.04
