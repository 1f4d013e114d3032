"""The detector against the renderer of data_pipelines, which it does not import."""

import numpy as np
import pytest
import torch

from umm_zoo.shapes import World, render, sample_scene, sample_stream
from umm_zoo.shapes import geometry as shapes_world
from umm_zoo.shapes import scenes as worlds
from umm_zoo.shapes.detector import Detection, ShapesDetector, true_scene
from umm_zoo.shapes.rendering import _masks, cell_box

SMALL = {"cells": 2, "num_colours": 4, "num_shapes": 2}
LARGE = {"cells": 3, "num_colours": 8, "num_shapes": 4}


def scenes(world: World, count: int, split: str = "test"):
    return [sample_scene(world, split, sample_stream(5, split, "detector", i)) for i in range(count)]


def images(world: World, drawn) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(world, scene) for scene in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_names_and_colours_are_the_renderers() -> None:
    for name in ("COLOURS", "BACKGROUNDS", "SHAPES", "SIZES", "PLACES"):
        assert getattr(shapes_world, name) == getattr(worlds, name), name
    assert (worlds.DETAILS["mark"], worlds.MAX_JITTER) == (shapes_world.MARKS, shapes_world.MAX_JITTER)


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("kind", [SMALL, LARGE])
def test_templates_are_what_the_renderer_paints(kind, image_size: int) -> None:
    world = World(**kind, image_size=image_size)
    boxes = shapes_world.cell_boxes(world.cells, image_size)
    for place, (rows, columns) in boxes.items():
        assert cell_box(world, place) == (rows, columns)
        size = (rows.stop - rows.start, columns.stop - columns.start)
        for shape in world.shapes:
            body, dot = _masks(world, size, shape, "small", "bottom left", (1, -2))
            found = shapes_world.coverage(*size, world.cells, image_size, shape, "small", "bottom left", (1, -2))
            torch.testing.assert_close(found[0], torch.from_numpy(body[..., 0]))
            torch.testing.assert_close(found[1], torch.from_numpy(dot[..., 0]))


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("kind", [SMALL, LARGE])
def test_it_is_right_on_renders(kind, image_size: int) -> None:
    world = World(**kind, image_size=image_size, max_objects=4)
    drawn = scenes(world, 100, "train") + scenes(world, 100, "heldout")
    found = ShapesDetector(**kind)(images(world, drawn))
    truths = [true_scene(scene.to_json()) for scene in drawn]
    assert np.mean([detection.shows(truth) for detection, truth in zip(found, truths, strict=True)]) > 0.99
    marks = [(detection.at(item.cell), item) for detection, truth in zip(found, truths, strict=True) for item in truth.objects]
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
    drawn = scenes(world, 200)
    noisy = images(world, drawn)
    noisy = noisy + 0.1 * torch.randn(noisy.shape, generator=generator)
    found = ShapesDetector(**SMALL)(noisy)
    assert np.mean([detection.shows(true_scene(scene.to_json())) for detection, scene in zip(found, drawn, strict=True)]) > 0.99


def test_flat_images_are_empty_scenes() -> None:
    flat = shapes_world.signal(shapes_world.BACKGROUNDS)[:, :, None, None].expand(4, 3, 32, 32)
    assert ShapesDetector()(flat) == [Detection(name, ()) for name in shapes_world.BACKGROUNDS]


def test_an_impossible_board_is_named() -> None:
    with pytest.raises(ValueError, match="expected 2 or 3 cells"):
        ShapesDetector(cells=4)
