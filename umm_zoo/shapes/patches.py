"""Patches that the images of a world without stripes, jitter and fine detail are made of, as a codec of image tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from umm_zoo.backbones.patch_codebook import PatchCodebook
from umm_zoo.errors import Count, UserError
from umm_zoo.shapes.rendering import cell_boxes, render
from umm_zoo.shapes.scenes import BACKGROUNDS, Object, Scene, World


class ShapesCodebook(PatchCodebook):
    """Codec whose codes are all patches of a world: it loses nothing of any scene, and is a function of its arguments alone.

    A board of 2 x 2 cells of 32 px has 260 patches of 8 px in four colours and two shapes, and 16 tokens an image.

    Args:
        world: with ``striped=False, max_jitter=0, detail="none"``.
        patch: side in pixels.

    Raises:
        UserError: the world's images are no such mosaic, or patches lie across the cells of its board.
    """

    def __init__(self, world: World, patch: Count = 8) -> None:
        super().__init__(patches_of(world, patch))


def patches_of(world: World, patch: int = 8) -> Tensor:
    """Distinct patches ``[K, 3, patch, patch]`` in [-1, 1] of all scenes of a world, in the order in which they first appear."""
    chance = {"striped": world.striped, "max_jitter": world.max_jitter, "detail": world.has_detail and world.detail}
    for name, value in chance.items():
        if value:
            expected = {"striped": False, "max_jitter": 0, "detail": "none"}[name]
            raise UserError(f"World.{name}", str(value), f"{expected}, or no few patches make up its images")
    edges = {edge for rows, _ in cell_boxes(world.cells, world.image_size).values() for edge in (rows.start, rows.stop)}
    if any(edge % patch for edge in edges):
        raise UserError("patch", f"{patch}", f"a divisor of the edges of the cells, {', '.join(map(str, sorted(edges)))} px")
    found: dict[bytes, np.ndarray] = {}
    for scene in _scenes_of_one(world):
        side = world.image_size // patch
        mosaic = render(world, scene).reshape(side, patch, side, patch, 3).transpose(0, 2, 4, 1, 3)
        for own in mosaic.reshape(-1, 3, patch, patch):
            found.setdefault(own.tobytes(), own)
    levels = torch.from_numpy(np.stack(list(found.values())))
    return (levels - 127.5) / 127.5  # as a loader makes floats of bytes


def _scenes_of_one(world: World) -> Iterator[Scene]:
    """Every background alone, then with every object in every cell: objects stay inside their cells, so no scene shows more."""
    for background in BACKGROUNDS:
        yield Scene(background, "", ())
        for shape, colour, size, cell in itertools.product(world.shapes, world.colours, world.sizes, world.places):
            yield Scene(background, "", (Object(shape, colour, size, cell),))
