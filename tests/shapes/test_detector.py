"""The detector on renders of known scenes, noisy ones and noise."""

import numpy as np
import pytest
import torch
from shapes_batches import images_of

from umm_zoo.shapes import World, sample_scene, sample_stream
from umm_zoo.shapes.detector import ShapesDetector
from umm_zoo.shapes.scenes import BACKGROUNDS, Scene

SMALL = {"cells": 2, "num_colours": 4, "num_shapes": 2}
LARGE = {"cells": 3, "num_colours": 8, "num_shapes": 4}


def scenes(world: World, count: int, split: str = "test"):
    return [sample_scene(world, split, sample_stream(5, split, "detector", i)) for i in range(count)]


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("kind", [SMALL, LARGE])
def test_it_is_right_on_renders(kind, image_size: int) -> None:
    world = World(**kind, image_size=image_size, max_objects=4)
    rendered = scenes(world, 100, "train") + scenes(world, 100, "heldout")
    found = ShapesDetector(**kind)(images_of(rendered, world))
    assert np.mean([seen.coarse() == scene.coarse() for seen, scene in zip(found, rendered, strict=True)]) > 0.99
    marks = [(seen.at(item.cell), item) for seen, scene in zip(found, rendered, strict=True) for item in scene.objects]
    assert np.mean([seen is not None and seen.mark == item.mark for seen, item in marks]) > 0.99


@pytest.mark.parametrize("kind", [SMALL, LARGE])
@pytest.mark.parametrize("noise", ["normal", "uniform", "blurred"])
def test_it_finds_nothing_in_noise(kind, noise: str) -> None:
    generator = torch.Generator().manual_seed(3)
    draw = torch.randn(100, 3, 32, 32, generator=generator)
    if noise == "uniform":
        draw = torch.rand(100, 3, 32, 32, generator=generator) * 2 - 1
    if noise == "blurred":
        draw = torch.nn.functional.interpolate(draw[..., :8, :8], scale_factor=4, mode="bilinear")
    assert all(not detection.objects for detection in ShapesDetector(**kind)(draw))


def test_it_bears_the_noise_of_a_codec() -> None:
    """At 26 decibels, less than the shipped codec's 30."""
    world, generator = World(**SMALL), torch.Generator().manual_seed(4)
    rendered = scenes(world, 200)
    noisy = images_of(rendered, world)
    noisy = noisy + 0.1 * torch.randn(noisy.shape, generator=generator)
    found = ShapesDetector(**SMALL)(noisy)
    assert np.mean([seen.coarse() == scene.coarse() for seen, scene in zip(found, rendered, strict=True)]) > 0.99


def test_flat_images_are_empty_scenes() -> None:
    flat = (torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1)[:, :, None, None].expand(4, 3, 32, 32)
    assert ShapesDetector()(flat) == [Scene(name, "", ()) for name in BACKGROUNDS]


def test_an_impossible_board_is_named() -> None:
    with pytest.raises(ValueError, match="expected 2 or 3 cells"):
        ShapesDetector(cells=4)
