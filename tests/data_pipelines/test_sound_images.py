"""Images whose pixels are sound are taken by converters and loader alike, whatever stands beside the pixels; others by neither."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.converters.files import stored_image
from data_pipelines.decoding import BadSampleError, decode_image
from data_pipelines.transforms.resize import Squeeze
from umm_zoo.generation.images import open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def encoded(image: Image.Image = IMAGE, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_chunk(kind: bytes, content: bytes, times: int = 1) -> bytes:
    """The PNG with a chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return encoded()[:33] + chunk * times + encoded()[33:]


def outcome(decode: object, *arguments: object) -> str:
    """Empty where an image is taken."""
    try:
        decode(*arguments)  # type: ignore[operator]
    except BadSampleError as error:
        return str(error).removeprefix("damaged image: ")
    return ""


CHECKSUM = struct.pack(">I", zlib.crc32(b"eXIfMM\0*\0\0\0\x08"))
LONG = zlib.compress(b"a" * 2_000_000)
SOUND = {
    "EXIF that is none": with_chunk(b"eXIf", b"garbage"),
    "EXIF cut short": with_chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff"),
    "empty EXIF": with_chunk(b"eXIf", b""),
    "EXIF with a wrong checksum": with_chunk(b"eXIf", b"MM\0*\0\0\0\x08").replace(b"\x08" + CHECKSUM, b"\x08none"),
    "text of 2 MB": with_chunk(b"zTXt", b"k\0\0" + LONG),
    "international text of 2 MB": with_chunk(b"iTXt", b"k\0\1\0\0\0" + LONG),
    "texts of 80 MB": with_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 1_000_000), times=80),
    "profile of 2 MB": with_chunk(b"iCCP", b"k\0\0" + LONG),
    "profile that is none": with_chunk(b"iCCP", b""),
    "resolution without numbers": with_chunk(b"pHYs", b""),
    "colour space without number": with_chunk(b"sRGB", b""),
    "animation without frames": with_chunk(b"acTL", bytes(8)),
    "animation": encoded(save_all=True, append_images=[IMAGE.rotate(180)]),
    "1 bit": encoded(IMAGE.convert("1")),
    "grey with transparency": encoded(IMAGE.convert("LA")),
    "palette with transparency": encoded(IMAGE.convert("P"), transparency=3),
    "colour that is transparent": encoded(transparency=(1, 2, 3)),
    "CMYK": encoded(IMAGE.convert("CMYK"), "JPEG"),
    "JPEG with EXIF that is none": encoded(kind="JPEG", exif=b"Exif\0\0garbage"),
    "JPEG with a profile that is none": encoded(kind="JPEG", icc_profile=b"garbage"),
    "MPO": encoded(kind="MPO", save_all=True, append_images=[IMAGE]),
    "WebP with EXIF that is none": encoded(kind="WEBP", exif=b"Exif\0\0garbage"),
    "animated WebP": encoded(kind="WEBP", save_all=True, append_images=[IMAGE]),
    "animated GIF": encoded(kind="GIF", save_all=True, append_images=[IMAGE.rotate(90)]),
    "JPEG 2000": encoded(kind="JPEG2000"),
    "TIFF in CMYK": encoded(IMAGE.convert("CMYK"), "TIFF"),
}
BAD = {
    "empty": b"",
    "text": b"hello",
    "Git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
    "PNG cut short": encoded()[:-40],
    "JPEG cut short": encoded(kind="JPEG")[:-30],
    "another format": encoded(IMAGE.resize((32, 32)), "ICO"),
}


@pytest.mark.parametrize("name", [*SOUND, *BAD])
@pytest.mark.parametrize("size", [None, 3])
def test_converter_and_loader_decide_alike(name, size):
    content = SOUND.get(name, BAD.get(name, b""))
    seen = outcome(decode_image, content, 4, Squeeze())
    assert outcome(stored_image, content, size) == seen
    assert (name in SOUND) == (seen == "")
    if not seen:
        assert outcome(decode_image, stored_image(content, size)[1], 4, Squeeze()) == ""


@pytest.mark.parametrize("name", SOUND)
def test_commands_open_what_the_loader_takes_with_its_pixels(name, tmp_path):
    (tmp_path / "image").write_bytes(SOUND[name])
    opened = open_image(tmp_path / "image")
    expected = decode_image(SOUND[name], 5, Squeeze("nearest")).astype(int)
    np.testing.assert_allclose(np.asarray(opened.resize((5, 5), Image.Resampling.NEAREST)).astype(int), expected, atol=1)


@pytest.mark.parametrize("name", list(SOUND)[:12])
def test_what_stands_beside_the_pixels_changes_none(name):
    np.testing.assert_array_equal(decode_image(SOUND[name], 5, Squeeze()), decode_image(encoded(), 5, Squeeze()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied_before_and_after_shrinking(kind, tmp_path):
    wide = Image.new("RGB", (40, 20), (250, 0, 0))
    wide.paste((0, 0, 250), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: the blue left half is the top one
    content = encoded(wide, kind, exif=exif)
    (tmp_path / "image").write_bytes(content)
    assert np.asarray(open_image(tmp_path / "image"))[:16, :, 2].mean() > 200
    for stored in (content, stored_image(content)[1], stored_image(content, 20)[1]):
        pixels = decode_image(stored, 10, Squeeze())
        assert pixels[:4, :, 2].mean() > 200 and pixels[6:, :, 0].mean() > 200


def test_what_stands_for_an_image_says_what_it_is():
    assert outcome(decode_image, BAD["Git-LFS pointer"], 4, Squeeze()).startswith("not an image: a Git-LFS pointer, expected the")
    assert outcome(decode_image, b"<!DOCTYPE html>", 4, Squeeze()).startswith("not an image: a web page")


def test_damage_in_half_of_the_bytes_is_seen_by_both_or_by_neither():
    random, decisions = np.random.default_rng(1), set()
    for content in [SOUND["CMYK"], SOUND["animated WebP"], SOUND["animation"], SOUND["TIFF in CMYK"], encoded(kind="GIF")] * 8:
        damaged = bytearray(content)
        damaged[int(random.integers(len(damaged)))] ^= 0x5A
        decisions.add((bool(outcome(decode_image, bytes(damaged), 4, Squeeze())), bool(outcome(stored_image, bytes(damaged)))))
    assert decisions == {(True, True), (False, False)}
