"""Cutting images for Qwen2.5-VL against the library's own processor."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from umm_zoo.backbones.qwen_images import PatchLayout

TINY = PatchLayout(patch_size=4, merge_size=2)


def library(layout):
    return Qwen2VLImageProcessorPil(
        patch_size=layout.patch_size,
        merge_size=layout.merge_size,
        temporal_patch_size=layout.temporal_size,
        size=dict(zip(("shortest_edge", "longest_edge"), layout.limits, strict=True)),
    )


def bytes_and_tensor(height, width, count=2):
    """8-bit images, smooth enough that resampling does not ring, as the library and as this package takes them."""
    coarse = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(height))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    whole = (smooth * 255).round().byte()
    return [np.asarray(image.permute(1, 2, 0)) for image in whole], whole.float() / 127.5 - 1


@pytest.mark.parametrize("layout", [TINY, PatchLayout(), PatchLayout(patch_size=6, merge_size=3, temporal_size=1)])
def test_patches_are_the_processors(layout):
    pixels, images = bytes_and_tensor(3 * layout.factor, 4 * layout.factor)
    expected = library(layout)(pixels, return_tensors="pt")
    assert_close(layout.patches(images), expected["pixel_values"], rtol=0, atol=1e-5)
    h, w = layout.grid(*images.shape[-2:])
    assert expected["image_grid_thw"].tolist() == [[1, h * layout.merge_size, w * layout.merge_size]] * 2


@pytest.mark.parametrize("size", [(30, 45), (9, 12), (120, 60)])
def test_resized_patches_are_the_processors_to_its_rounding(size):
    layout = PatchLayout(patch_size=4, merge_size=2, max_pixels=3900)
    pixels, images = bytes_and_tensor(*size)
    own, expected = layout.patches(images), library(layout)(pixels, return_tensors="pt")["pixel_values"]
    assert own.shape == expected.shape
    assert (own - expected).abs().max() < 2.5 / 255 / 0.26  # it rounds to 8 bits after each of two passes; deviation .26 at least


@pytest.mark.parametrize(
    ("limits", "size"),
    [((3136, 65536), (20, 4000)), ((100_000, 110_000), (28, 28)), ((784, 784), (33, 1000)), ((784, 784), (1, 9))],
)
def test_a_size_beyond_the_limits_is_cut_as_it_is(limits, size):
    """A side is a token at least, and rounding up to the smallest area may pass the largest: resized again it would change."""
    layout = PatchLayout(min_pixels=limits[0], max_pixels=limits[1])
    assert layout.resized(*layout.resized(*size)) != layout.resized(*size)
    pixels, images = bytes_and_tensor(*size, count=1)
    expected = library(layout)(pixels, return_tensors="pt", input_data_format="channels_last")
    own = layout.patches(images)
    assert own.shape == expected["pixel_values"].shape and (own - expected["pixel_values"]).abs().max() < 2.5 / 255 / 0.26
    assert expected["image_grid_thw"].tolist() == [[1, *(2 * side for side in layout.grid(*size))]]


@pytest.mark.parametrize(("smallest", "largest"), [(3136, 12845056), (3136, 65536), (5000, 65536), (784 * 7 + 1, 784 * 40 - 1)])
def test_sizes_are_the_librarys_for_any_limits(smallest, largest, tmp_path):
    """Whether they are stated or read from a processor's file; they need be no whole number of tokens."""
    (tmp_path / "preprocessor_config.json").write_text(f'{{"min_pixels": {smallest}, "max_pixels": {largest}}}')
    read = PatchLayout(14, 2, 2, *PatchLayout().limits_from(str(tmp_path)))
    stated = PatchLayout(min_pixels=smallest, max_pixels=largest)
    generator = torch.Generator().manual_seed(0)
    for height, width in torch.randint(1, 1000, (300, 2), generator=generator).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        expected = smart_resize(height, width, factor=28, min_pixels=smallest, max_pixels=largest)
        assert stated.resized(height, width) == read.resized(height, width) == expected, (height, width)


def test_one_token_per_eight_pixels():
    assert TINY.grid(32, 32) == (4, 4) and TINY.grid(16, 40) == (2, 5)


def test_extreme_shapes_are_refused():
    with pytest.raises(ValueError, match="more than 200 times"):
        TINY.resized(1, 201)


def test_patches_carry_gradients():
    images = torch.zeros(1, 3, 30, 30, requires_grad=True)
    TINY.patches(images).sum().backward()
    assert (images.grad != 0).all()


def test_preprocessor_file_round_trip(tmp_path):
    layout = PatchLayout(patch_size=4, min_pixels=600, max_pixels=6500)
    layout.save(tmp_path)
    assert TINY.limits_from(str(tmp_path)) == (600, 6500)
    loaded = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert (loaded.patch_size, loaded.size["longest_edge"]) == (4, 6500)
    with pytest.raises(ValueError, match="patch_size: found 4, expected 14"):
        PatchLayout().limits_from(str(tmp_path))


def test_limits_that_a_file_leaves_out_are_the_librarys(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    library = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    assert PatchLayout().limits_from(str(tmp_path)) == (library["shortest_edge"], library["longest_edge"])


def test_published_limits_in_either_spelling(tmp_path):
    for text in ('{"min_pixels": 3136, "max_pixels": 65536}', '{"size": {"shortest_edge": 3136, "longest_edge": 65536}}'):
        (tmp_path / "preprocessor_config.json").write_text(text)
        assert PatchLayout().limits_from(str(tmp_path)) == (3136, 65536)
