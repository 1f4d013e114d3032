"""Principal components of a world's patches: what is kept, what is lost, and that axes are those of the variance."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from umm_zoo.errors import UserError
from umm_zoo.shapes import World
from umm_zoo.shapes.patches import PrincipalPatches, patches_of

WORLD = World(striped=False, max_jitter=0, detail="none")


def test_patches_of_the_world_come_back_bit_by_bit_and_others_become_the_nearest() -> None:
    codec, patches = PrincipalPatches(WORLD), patches_of(WORLD)
    latents = codec.encode(patches)
    assert latents.shape == (260, 16, 1, 1) and float(latents.square().mean()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(codec.decode(latents), patches)
    assert torch.equal(codec.decode(latents + 0.01 * torch.randn_like(latents).sign()), patches)


def test_axes_are_orthonormal_and_sixteen_keep_97_percent_of_the_variance() -> None:
    codec, patches = PrincipalPatches(WORLD), patches_of(WORLD).flatten(1)
    assert_close(codec.axes @ codec.axes.T, torch.eye(16), atol=1e-5, rtol=0)
    kept = (codec.encode(patches_of(WORLD)) / codec.scaling).square().sum() / (patches - patches.mean(0)).square().sum()
    assert float(kept) == pytest.approx(0.966, abs=2e-3)


def test_cells_lie_in_raster_order_of_an_image_that_is_not_square() -> None:
    codec, patches = PrincipalPatches(WORLD), patches_of(WORLD)
    rows = [torch.cat(list(patches[[0, 7, 100]]), dim=2), torch.cat(list(patches[[5, 200, 3]]), dim=2)]
    image = torch.cat(rows, dim=1)[None]
    latents = codec.encode(image)
    assert latents.shape == (1, 16, 2, 3)
    assert_close(latents[0, :, 1, 1], codec.encode(patches[200:201])[0, :, 0, 0])
    assert torch.equal(codec.decode(latents), image)


def test_more_components_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match="at most 192"):
        PrincipalPatches(WORLD, 193)
