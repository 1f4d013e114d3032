"""Sizes that image policies make, against what they make of pixels, and against the releases they come from."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data_pipelines.decoding import BadSampleError, decode_images, open_image, upright_size
from data_pipelines.shards.data import ShardData
from data_pipelines.transforms.image_transform import ImageTransform
from data_pipelines.transforms.resize import PadToSquare, Square, Squeeze
from data_pipelines.transforms.shaped import Bucket, Native
from data_pipelines.transforms.tiles import Tiles
from tools import show_policies
from umm_zoo.errors import UserError

PAGE = Path("data_pipelines/transforms/policies.png")

POLICIES = [Square(), Squeeze(), PadToSquare(), Bucket(8), Native(patch=7), Native(3, 12, patch=14), Tiles()]
#: Table of SDXL (Podell et al. 2023, appendix I): height and width of each bucket.
SDXL = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472
704x1408 704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024
1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832 1216x832 1280x768 1344x768 1408x704
1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512 2048x512"""


def encoded(width: int, height: int, kind: str = "PNG", orientation: int = 1, seed: int = 0) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, kind, exif=exif, quality=95)
    return file.getvalue()


def random_sizes(count: int, most: int, seed: int = 0) -> list[list[int]]:
    return np.exp(np.random.default_rng(seed).uniform(0, np.log(most), (count, 2))).astype(int).tolist()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_the_size_foretold_is_that_of_the_pixels(policy):
    rng = np.random.default_rng(1)
    for width, height in random_sizes(40, 300):
        size = int(rng.integers(28, 70))
        kind, orientation = str(rng.choice(["PNG", "JPEG", "WEBP", "TIFF"])), int(rng.integers(1, 9))
        with open_image(content := encoded(width, height, kind, orientation)) as image:
            upright = upright_size(image)
        made = decode_images(content, size, policy)
        assert made.full == upright == ((width, height) if orientation < 5 else (height, width))
        assert {image.shape[1::-1] for image in made.images} == {policy.output_size(*upright, size)}
        assert len(made.images) == policy.num_images(*upright, size)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_the_jpeg_decoder_shrinks_on_the_way_and_nothing_else_changes(policy, monkeypatch):
    for orientation, (width, height) in ((1, (1216, 528)), (6, (528, 1216)), (3, (1216, 528))):
        content = encoded(width, height, "JPEG", orientation)
        with open_image(content) as image:
            monkeypatch.setattr(type(image), "draft", lambda self, mode, size: None)
            whole = decode_images(content, 48, policy).images
            monkeypatch.undo()
        quick = decode_images(content, 48, policy).images
        for one, other in zip(whole, quick, strict=True):
            assert np.abs(one.astype(int) - other).max() <= 2


def test_an_orientation_behind_the_pixels_of_a_png_turns_it():
    content = encoded(9, 4, "PNG", 6)
    start = content.index(b"eXIf") - 4
    chunk = content[start : start + int.from_bytes(content[start : start + 4], "big") + 12]
    end = content.index(b"IEND") - 4
    moved = content[:start] + content[start + len(chunk) : end] + chunk + content[end:]
    with open_image(moved) as image:
        assert upright_size(image) == (4, 9)
    assert (decode_images(moved, 8, Squeeze()).images[0] == decode_images(content, 8, Squeeze()).images[0]).all()


def test_buckets_of_the_default_values_are_those_of_sdxl():
    table = {tuple(map(int, pair.split("x")))[::-1] for pair in SDXL.split()}
    assert set(Bucket().sizes(1024)) == table | {(704, 1344)}  # which the paper lists lying only


@pytest.mark.parametrize(("size", "multiple"), [(32, 8), (64, 32), (100, 64), (256, 28), (512, 56), (300, 300)])
def test_buckets_are_multiples_within_the_area_and_the_square_is_among_them(size, multiple):
    sizes = Bucket(multiple).sizes(size)
    assert all(width % multiple == height % multiple == 0 and width * height <= size**2 for width, height in sizes)
    assert all(max(pair) <= 4 * min(pair) for pair in sizes) and {pair[::-1] for pair in sizes} == set(sizes)
    assert (size // multiple * multiple,) * 2 in sizes


def test_the_nearest_bucket_loses_least():
    policy, size = Bucket(64), 512

    def lost(width, height, columns, rows):
        scale = max(columns / width, rows / height)
        return 1 - columns * rows / (width * height * scale**2)

    for width, height in random_sizes(300, 4000):
        chosen = lost(width, height, *policy.output_size(width, height, size))
        assert chosen == pytest.approx(min(lost(width, height, *pair) for pair in policy.sizes(size)))
        assert policy.crop(width, height, size).lost == pytest.approx(chosen, abs=0.02)


def test_a_crop_says_what_was_cut_out():
    crop = Bucket(64).crop(1920, 1080, 512)  # 640 x 384 covers 16:9 at 682 2/3 x 384
    assert crop.original == (1080, 1920) and crop.kept == (384, 640) and crop.resized == (384, 683) and crop.offset == (0, 21)
    assert PadToSquare().crop(200, 100, 64).lost == Squeeze().crop(200, 100, 64).lost == 0
    assert Square().crop(200, 100, 50).lost == 0.5


@pytest.mark.parametrize("limits", [{}, {"min_tokens": 4, "max_tokens": 1280}, {"min_tokens": 256, "max_tokens": 300, "patch": 32}])
def test_native_sizes_are_those_of_qwen(limits):
    policy, size = Native(**limits), 700
    most = limits["max_tokens"] * policy.patch**2 if limits else size**2
    for width, height in random_sizes(3000, 5000):
        if max(width, height) <= 200 * min(width, height):
            expected = smart_resize(height, width, policy.patch, policy.min_tokens * policy.patch**2, most)
            assert policy.output_size(width, height, size)[::-1] == expected


def test_native_refuses_the_ribbons_that_qwen_refuses():
    with pytest.raises(BadSampleError, match="an image of 402 x 2"):
        decode_images(encoded(402, 2), 100, Native())
    assert decode_images(encoded(400, 2), 100, Native()).images[0].shape[:2] == smart_resize(2, 400, 28, 3136, 10_000)


def test_grids_of_tiles_are_those_of_llava():
    policy = Tiles()
    for width, height in [*random_sizes(3000, 3000), [300, 300], [336, 336], [1000, 1000]]:
        pinpoints = [(columns * 336, rows * 336) for columns, rows in policy.grids]
        expected = select_best_resolution((width, height), pinpoints)
        assert policy.output_size(width, height, 336) == (336, 336)
        assert tuple(count * 336 for count in policy.grid(width, height, 336)) == expected


@pytest.mark.parametrize(("width", "height"), [(97, 53), (40, 90), (33, 31), (200, 20)])
def test_tiles_are_those_of_the_stock_processor(width, height):
    content = encoded(width, height)
    grids = [[rows * 24, columns * 24] for columns, rows in Tiles().grids]
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=grids,
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor([Image.open(io.BytesIO(content))], return_tensors="np")["pixel_values"][0].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(np.stack(decode_images(content, 24, Tiles()).images), expected, atol=1)


def test_the_image_of_the_page_is_what_the_tool_draws(tmp_path, capsys):
    assert show_policies.main(["--out", str(tmp_path / "sheet.png")]) == 0
    ours, page = (np.asarray(Image.open(file).convert("RGB")).astype(int) for file in (tmp_path / "sheet.png", PAGE))
    assert ours.shape == page.shape and np.abs(ours - page).mean() < 2  # fonts and filters of another version
    assert show_policies.main(["--image", str(tmp_path / "none.jpg")]) == 2 and "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("policy", [Bucket(64), Native(min_tokens=9)])
def test_a_size_too_small_for_a_policy_is_one_line(policy):
    with pytest.raises(UserError, match=r"^data\.target_resize: found .* expected at least"):
        ShardData(image_size=512, target_size=63, target_resize=policy)


def test_a_trial_has_the_square_and_the_sides_of_the_smallest_common_factor():
    assert ImageTransform(32, 16, Square(), None).shapes() == [((32, 32), (16, 16))]
    shapes = ImageTransform(448, 512, Native(), Bucket(32)).shapes()
    assert shapes[0] == ((448, 448), (512, 512)) and len(shapes) == 3
    assert min(math.gcd(*shown) for shown, _ in shapes) == 28 and min(math.gcd(*made) for _, made in shapes) == 32
