import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from umm_zoo.shapes import Object, Scene, World, render, sample_scene, sample_stream
from umm_zoo.shapes.rendering import cell_boxes, encode_png
from umm_zoo.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, STRIPES

WORLDS = [World(cells=cells, num_colours=8, num_shapes=4, max_objects=4, image_size=size) for cells in (2, 3) for size in (32, 64)]
JITTERS = [(0, 0), (2, -2), (-2, 2), (-1, -2)]


def alone(item):
    return Scene("grey", "rising", (item,))


@pytest.mark.parametrize("world", WORLDS)
def test_most_of_an_object_has_its_colour(world):
    for i in range(40):
        scene = sample_scene(world, "train", sample_stream(0, "train", "any", i))
        image = render(world, scene)
        for item in scene.objects:
            patch = image[cell_boxes(world.cells, world.image_size)[item.cell]].astype(int)
            middle = patch[patch.shape[0] // 2 - 1 : patch.shape[0] // 2 + 2, patch.shape[1] // 2 - 1 : patch.shape[1] // 2 + 2]
            distances = {name: np.abs(middle - colour).sum(-1).min() for name, colour in COLOURS.items()}
            assert min(distances, key=distances.get) == item.colour and distances[item.colour] <= 3


@pytest.mark.parametrize("world", WORLDS)
def test_nothing_is_painted_outside_the_cell(world):
    for i in range(20):
        scene = sample_scene(world, "train", sample_stream(1, "train", "any", i))
        blank, image = render(world, replace(scene, objects=())), render(world, scene)
        for item in scene.objects:
            box = cell_boxes(world.cells, world.image_size)[item.cell]
            blank[box] = image[box]
        np.testing.assert_array_equal(blank, image)


@pytest.mark.parametrize("detail", ["mark", "stripes", "glyph"])
@pytest.mark.parametrize("cells", [2, 3])
def test_detail_is_read_by_the_nearest_template(cells, detail):
    """Templates without jitter tell the four details apart in shifted objects, for every shape, size and colour."""
    world = World(cells=cells, num_colours=8, num_shapes=4, detail=detail)
    for shape in SHAPES:
        for size in world.sizes:
            for colour in ("red", "yellow"):
                item = Object(shape, colour, size, "top left", world.marks[0])
                templates = {mark: render(world, alone(replace(item, mark=mark))).astype(int) for mark in world.marks}
                for mark in world.marks:
                    for jitter in JITTERS:
                        seen = render(world, alone(replace(item, mark=mark, jitter=jitter)))
                        distance = {name: np.abs(seen - template).sum() for name, template in templates.items()}
                        assert min(distance, key=distance.get) == mark, (shape, size, mark, jitter)


@pytest.mark.parametrize("world", WORLDS)
def test_mark_changes_few_pixels_and_only_inside_the_object(world):
    pixel = world.image_size // 32
    for shape in SHAPES:
        for size in world.sizes:
            item = Object(shape, "red", size, "bottom right", "top left", (1, -2))
            images = [render(world, alone(replace(item, mark=mark))).astype(int) for mark in world.marks]
            body = np.abs(images[0] - render(world, replace(alone(item), objects=()))).sum(-1) > 0
            for other in images[1:]:
                changed = np.abs(images[0] - other).sum(-1) > 0
                assert not (changed & ~body).any()
                # Two dots of area pi, each touching at most 3x3 (at 64 px 5x5) pixels.
                assert 4 * pixel <= changed.sum() <= 2 * (2 * pixel + 1) ** 2
                assert np.abs(images[0] - other).sum(-1).max() > 250


def test_edges_are_anti_aliased():
    image = render(World(), alone(Object("circle", "red", "large", "top left", "top left"))).astype(int)
    inside, outside = np.array(COLOURS["red"]), np.array(BACKGROUNDS["grey"])
    share = (image[:16, :16] - outside) @ (inside - outside) / ((inside - outside) ** 2).sum()
    assert ((share > 0.2) & (share < 0.8)).sum() > 8


@pytest.mark.parametrize("size", ["small", "large"])
def test_sizes_differ_and_shapes_have_similar_areas(size):
    def area(shape, size):
        item = Object(shape, "red", size, "middle centre", "top left")
        images = [render(World(cells=3), replace(alone(item), objects=objects)).astype(int) for objects in ((item,), ())]
        return (np.abs(images[0] - images[1]).sum(-1) > 60).sum()

    areas = [area(shape, size) for shape in SHAPES]
    assert max(areas) < 1.6 * min(areas)
    assert all(area(shape, "large") > 1.4 * area(shape, "small") for shape in SHAPES)


def test_backgrounds_carry_their_stripes():
    images = {stripes: render(World(), Scene("slate", stripes, ())) for stripes in STRIPES}
    assert len({image.tobytes() for image in images.values()}) == 4
    assert np.ptp(images["horizontal"].astype(int), axis=1).max() == 0 < np.ptp(images["horizontal"].astype(int), axis=0).min()
    for image in images.values():
        assert np.abs(image.reshape(-1, 3).mean(0) - BACKGROUNDS["slate"]).max() < 1.5


def test_png_is_lossless():
    image = render(World(), alone(Object("square", "blue", "large", "top left", "top left")))
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(encode_png(image)))), image)
