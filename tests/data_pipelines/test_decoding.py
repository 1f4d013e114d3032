import io
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.decoding import (
    BadSampleError,
    decode_array,
    decode_image,
    decode_json,
    decode_text,
)
from data_pipelines.shards.batches import to_signal
from data_pipelines.transforms.resize import PadToSquare, Square, Squeeze
from umm_zoo.generation.grey import eight_bit


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(content: bytes, size: int = 4, resize=None, **options) -> np.ndarray:
    return decode_image(content, size, resize or Square("nearest"), **options)


def test_plain_pixels_survive_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels))), pixels)


def test_transparency_is_laid_on_white():
    half_red = Image.new("RGBA", (4, 4), (255, 0, 0, 51))
    assert decode(encoded(half_red))[0, 0].tolist() == [255, 204, 204]
    assert decode(encoded(Image.new("LA", (4, 4), (0, 0))))[0, 0].tolist() == [255] * 3


def test_a_transparent_palette_is_laid_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 0, 0, 255])
    assert decode(encoded(image))[0, 0].tolist() == [0, 0, 255]
    assert decode(encoded(image, transparency=1))[0, 0].tolist() == [255] * 3


def test_transparency_of_a_plain_rgb_png_counts():
    assert decode(encoded(Image.new("RGB", (4, 4), (7, 8, 9)), transparency=(7, 8, 9)))[0, 0].tolist() == [255] * 3


def test_sixteen_bits_become_eight_by_scale_not_by_clipping():
    values = np.array([[0, 256], [32768, 65535]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(values)), 2)[..., 0].tolist() == [[0, 1], [128, 255]]


def grey16(values, kind: str = "PNG", **options) -> bytes:
    return encoded(Image.fromarray(np.array(values, dtype=np.uint16)), kind, **options)


def netpbm(white: int, values: list[int]) -> bytes:
    return b"P5 2 2 %d\n" % white + np.array(values, dtype=">u2").tobytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (grey16([[0, 1], [100, 255]]), [[0, 0], [0, 1]]),  # a dark one, all of whose values would fit into 8 bits
        (grey16([[257, 514], [2570, 25700]]), [[1, 2], [10, 100]]),
        (grey16([[257, 514], [2570, 65535]], "TIFF"), [[1, 2], [10, 255]]),
        (grey16([[0, 514], [2570, 65535]], "TIFF", tiffinfo={262: 0}), [[255, 253], [245, 0]]),  # white is zero
        (grey16([[257, 514], [2570, 257]], transparency=514), [[1, 255], [10, 1]]),
        (grey16([[257, 514], [2570, 0]], "TIFF", tiffinfo={274: 6}), [[10, 1], [0, 2]]),
        (netpbm(4095, [0, 16, 2048, 4095]), [[0, 1], [128, 255]]),
        (netpbm(4095, [0, 1, 2, 3]), [[0, 0], [0, 0]]),
        (encoded(Image.fromarray(np.array([[0, 0.25], [0.5, 1]], dtype=np.float32)), "TIFF"), [[0, 64], [128, 255]]),
        (encoded(Image.fromarray(np.array([[0, 0.004], [0, 0]], dtype=np.float32)), "TIFF"), [[0, 1], [0, 0]]),
    ],
)
def test_deep_grey_goes_by_the_range_of_its_type_and_not_by_its_brightest_pixel(content: bytes, expected: list[list[int]]) -> None:
    assert decode(content, 2)[..., 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 1]], dtype=np.int32), "does not say which value is white"),
        (np.array([[0, 200]], dtype=np.float32), "grey values from 0 to 200, expected 0 to 1"),
        (np.array([[0, -0.5]], dtype=np.float32), "from -0.5 to 0, expected 0 to 1"),
        (np.array([[0, np.nan]], dtype=np.float32), "grey values from nan to nan"),
    ],
)
def test_grey_whose_white_is_unknown_is_a_bad_sample(values: np.ndarray, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        decode(encoded(Image.fromarray(values), "TIFF"), 2)


def test_a_large_deep_grey_image_takes_little_more_memory_than_its_file() -> None:
    """36 million pixels are 72 MB decoded; numpy's share is traced, PIL's is shrunk before it becomes colour."""
    content = grey16(np.zeros((6000, 6000)))
    tracemalloc.start()
    decode(content, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_deep_grey_shrunk_on_the_way_is_what_it_would_be() -> None:
    smooth = np.add.outer(np.arange(2005), np.arange(2403)) * 14
    whole = eight_bit(Image.fromarray(smooth.astype(np.uint16))).convert("RGB")
    found = decode(grey16(smooth), 32, Square())
    np.testing.assert_allclose(found.astype(int), np.asarray(Square()(whole, 32)).astype(int), atol=2)


def test_cmyk_and_grey_are_converted():
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert decode(encoded(Image.new("L", (4, 4), 77)))[0, 0].tolist() == [77] * 3
    assert decode(encoded(Image.new("1", (4, 4), 1)))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(kind, orientation):
    upright = np.zeros((16, 16, 3), dtype=np.uint8)
    upright[:8, :8], upright[:8, 8:] = 255, 128  # white top left, grey top right: tells all eight apart
    undo = {2: np.fliplr, 3: lambda a: a[::-1, ::-1], 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2)}
    undo |= {6: np.rot90, 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}
    stored = Image.fromarray(np.ascontiguousarray(undo.get(orientation, lambda a: a)(upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, kind, exif=exif, quality=100), 2)[..., 0]
    np.testing.assert_allclose(found, [[255, 128], [0, 0]], atol=4)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("P", (4, 4), 0), Image.new("P", (4, 4), 1)]
    for frame in frames:
        frame.putpalette([10, 20, 30, 200, 0, 0])
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert decode(content)[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"GIF89a", "not an image"),
        (b"<html>404</html>", "not an image"),
        (encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:900], "truncated"),
        (encoded(Image.effect_noise((64, 64), 90).convert("RGB"))[:900], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_is_no_image_is_a_bad_sample(content, reason):
    with pytest.raises(BadSampleError, match=reason):
        decode(content)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    bomb = encoded(Image.new("1", (20_000, 20_000)))  # 50 kB that would become 1.2 GB
    with pytest.raises(BadSampleError, match=r"limit of \d+"):
        decode(bomb)
    with pytest.raises(BadSampleError, match=r"over the limit of 15"):
        decode(encoded(Image.new("RGB", (4, 4))), max_pixels=15)


def stripes(width: int, height: int) -> bytes:
    """Columns valued by their place: left 0, right 250."""
    row = np.linspace(0, 250, width).astype(np.uint8)
    return encoded(Image.fromarray(np.repeat(row[None, :, None], height, 0).repeat(3, 2)))


def test_policies_keep_crop_or_squeeze_the_long_edge():
    square, squeeze = (decode(stripes(64, 16), 16, policy)[8, :, 0] for policy in (Square(), Squeeze()))
    assert 90 < square[0] < 100 and 150 < square[-1] < 160  # the middle quarter
    assert squeeze[0] < 10 and squeeze[-1] > 240  # both ends
    padded = decode(stripes(64, 16), 16, PadToSquare(fill=9))[..., 0]
    assert (padded[:6] == 9).all() and (padded[10:] == 9).all() and padded[8, 0] < 15 and padded[8, -1] > 235


def test_halving_in_the_jpeg_decoder_changes_next_to_nothing():
    smooth = Image.fromarray(np.indices((512, 512)).sum(0).astype(np.uint16).clip(0, 1023).astype(np.float32) / 4).convert("RGB")
    content = encoded(smooth, "JPEG", quality=95)
    plain = Square()(Image.open(io.BytesIO(content)), 32)
    np.testing.assert_allclose(decode(content, 32, Square()).astype(int), np.asarray(plain).astype(int), atol=3)


def test_signal_runs_from_minus_one_to_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 1, 1, 3)
    torch.testing.assert_close(to_signal(images), torch.tensor([-1.0, 1.0, -0.6]).reshape(1, 3, 1, 1))


def test_channels_come_to_the_front():
    images = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3)
    assert torch.equal(to_signal(images), images.permute(0, 3, 1, 2).float().sub(127.5).div(127.5))
    assert to_signal(images).is_contiguous()


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda: decode_text(b"caf\xe9", 99), r"not UTF-8 \(byte 3\)"),
        (lambda: decode_text(b"x" * 100_000, 65_536), "100000 characters"),
        (lambda: decode_json(b"{", 99), "cannot be parsed"),
        (lambda: decode_json(b"[1]", 99), "holds a list"),
        (lambda: decode_json(b"[" * 60_000, 99_999), "cannot be parsed"),
        (lambda: decode_array(b"\x80\x04N."), "cannot be read"),
    ],
)
def test_bad_text_and_arrays_say_why(read, reason):
    with pytest.raises(BadSampleError, match=reason):
        read()


def test_arrays_of_objects_are_never_unpickled():
    file = io.BytesIO()
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(BadSampleError, match="allow_pickle"):
        decode_array(file.getvalue())
