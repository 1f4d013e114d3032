"""A codec of patches: nearest patch, raster order, and what it refuses."""

import pytest
import torch

from umm_zoo.backbones.patch_codebook import PatchCodebook
from umm_zoo.batch import Grid
from umm_zoo.errors import UserError
from umm_zoo.testing.roles import check_role


def book(count: int = 5, side: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_token_is_the_nearest_patch_in_raster_order() -> None:
    patches, codec = book(), PatchCodebook(book())
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1
    codes = codec.codes(images)
    assert codes.shape == (2, 6, 1) and codes.dtype == torch.int64
    for number, image in enumerate(images):
        for place in range(6):
            row, column = divmod(place, 3)
            cell = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert codes[number, place] == min(range(5), key=lambda k: float((cell - patches[k]).square().sum()))


def test_a_mosaic_comes_back_bit_by_bit() -> None:
    codec = PatchCodebook(book())
    codes = torch.randint(5, (3, 6, 1), generator=torch.Generator().manual_seed(3))
    images = codec.images(codes, Grid(2, 3))
    assert images.shape == (3, 3, 4, 6) and torch.equal(images[1, :, 2:, :2], codec.patches[codes[1, 3, 0]])
    assert torch.equal(codec.codes(images), codes)


def test_it_is_a_codec_as_others_are() -> None:
    check_role(PatchCodebook(book()))


def test_half_precision_leaves_the_book_as_it_is() -> None:
    codec = PatchCodebook(book()).bfloat16()
    assert codec.patches.dtype == torch.float32
    assert codec.codes(codec.images(torch.tensor([[[0], [1], [2], [3]]])).bfloat16()).flatten().tolist() == [0, 1, 2, 3]


def test_what_is_no_mosaic_is_named() -> None:
    with pytest.raises(UserError, match="found 4 x 5 px, expected multiples of 2 px"):
        PatchCodebook(book()).codes(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"found \[5, 3, 2, 1\], expected \[K, 3, p, p\]"):
        PatchCodebook(book()[..., :1])
