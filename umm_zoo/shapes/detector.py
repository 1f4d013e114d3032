"""An exact detector for images of the synthetic shapes world: each cell is compared with every object that could lie there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from umm_zoo.shapes.geometry import (
    BACKGROUNDS,
    COLOURS,
    MARKS,
    MAX_JITTER,
    PLACES,
    SHAPES,
    SIZES,
    cell_boxes,
    coverage,
    inks,
    signal,
)


@dataclass(frozen=True)
class Found:
    """An object that was found, or one that should be."""

    cell: str
    shape: str
    colour: str
    size: str
    mark: str = ""

    def same(self, other: Found) -> bool:
        """Whether both agree in everything but the mark."""
        return (self.cell, self.shape, self.colour, self.size) == (other.cell, other.shape, other.colour, other.size)


@dataclass(frozen=True)
class Detection:
    """What an image shows; ``background`` is None where it is none of the world's."""

    background: str | None
    objects: tuple[Found, ...]

    def at(self, cell: str) -> Found | None:
        """The object of a cell."""
        return next((item for item in self.objects if item.cell == cell), None)

    def shows(self, truth: Detection) -> bool:
        """Whether background and objects are the true ones, marks aside."""
        pairs = [(item, truth.at(item.cell)) for item in self.objects]
        return (
            self.background == truth.background
            and len(self.objects) == len(truth.objects)
            and all(other is not None and item.same(other) for item, other in pairs)
        )


def true_scene(scene: Mapping[str, Any]) -> Detection:
    """The ground truth of a shard (``meta["scene"]`` or ``meta["target_scene"]``) as a detection."""
    objects = (Found(*(item[name] for name in ("cell", "shape", "colour", "size", "mark"))) for item in scene["objects"])
    return Detection(scene["background"], tuple(objects))


class ShapesDetector:
    """Finds background and objects of a scene by comparing every cell with its template of every object, and with none.

    Analysis by synthesis: the template of least squared error wins, over all objects of a cell and over the four backgrounds of the
    whole image. A cell counts as filled where an object leaves at most ``max_share`` of the error that the empty cell leaves,
    and at most ``max_error`` in itself; noise therefore shows nothing. Templates take part unshifted and at the ends of the world's
    jitter, and have a dot for a mark (``World(detail="mark")``).

    Args:
        cells: per side.
        num_colours: the first of the world's colours.
        num_shapes: the first of the world's shapes.
        max_error: root mean square over the pixels of a cell, of values in [-1, 1].
        max_share: of the squared error.

    Raises:
        ValueError: the world has no such board, or no so many colours or shapes.
    """

    def __init__(
        self, cells: int = 2, num_colours: int = 4, num_shapes: int = 2, max_error: float = 0.3, max_share: float = 0.5
    ) -> None:
        if cells not in PLACES or not 1 <= num_colours <= len(COLOURS) or not 1 <= num_shapes <= len(SHAPES):
            raise ValueError(
                f"ShapesDetector: found {cells} cells, {num_colours} colours and {num_shapes} shapes, expected "
                f"{' or '.join(map(str, PLACES))} cells, 1 to {len(COLOURS)} colours and 1 to {len(SHAPES)} shapes"
            )
        self.cells, self.num_colours, self.num_shapes = cells, num_colours, num_shapes
        self.max_error, self.max_share = max_error, max_share

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Detection]:
        """What each of ``images`` ``[B, 3, H, W]`` in [-1, 1] shows; square, of any size the world can be drawn in."""
        images = images.detach().float().clamp(-1, 1)
        boxes = cell_boxes(self.cells, images.shape[-1])
        empty, best, which = [], [], []
        for rows, columns in boxes.values():
            patch = images[:, :, rows, columns]
            kind = (self.cells, images.shape[-1], self.num_colours, self.num_shapes)
            templates = _templates(patch.shape[2], patch.shape[3], *kind)
            nothing, errors = templates.errors(patch)  # [B, backgrounds], [B, backgrounds, colours, masks]
            least, index = errors.flatten(2).min(dim=2)
            empty.append(nothing)
            best.append(least)
            which.append(index)
        return self._read(torch.stack(empty, 1).cpu(), torch.stack(best, 1).cpu(), torch.stack(which, 1).cpu(), list(boxes))

    def _read(self, empty: Tensor, best: Tensor, which: Tensor, places: list[str]) -> list[Detection]:
        """``[B, cells, backgrounds]`` mean squared errors without and with the best object, and which that is."""
        background = torch.minimum(empty, best).sum(dim=1).argmin(dim=1)  # [B]
        pick = background[:, None, None].expand(-1, len(places), 1)
        empty, best, which = (values.gather(2, pick)[..., 0] for values in (empty, best, which))  # [B, cells]
        filled = (best <= self.max_share * empty) & (best <= self.max_error**2)
        clear = ((torch.where(filled, best, empty) <= self.max_error**2).float().mean(dim=1) > 0.5).tolist()
        masks = _mask_names(self.num_shapes)
        found = []
        for row in range(len(empty)):
            objects = []
            for i in filled[row].nonzero().flatten().tolist():
                colour, mask = divmod(int(which[row, i]), len(masks))
                shape, size, mark, _ = masks[mask]
                objects.append(Found(places[i], shape, list(COLOURS)[colour], size, mark))
            found.append(Detection(list(BACKGROUNDS)[int(background[row])] if clear[row] else None, tuple(objects)))
        return found


@dataclass(frozen=True)
class _Templates:
    """Masks of a cell: background, body and mark add up to one in every pixel, so errors need inner products with these only."""

    masks: Tensor  # [K, 3, P]: of K (shape, size, mark, jitter), shares of background, body and mark
    paints: Tensor  # [backgrounds, colours, 3 (mask), 3 (channel)]

    def errors(self, patch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared errors: of empty cells ``[B, backgrounds]`` and of filled ones ``[B, backgrounds, colours, K]``."""
        device = patch.device
        masks, paints = self.masks.to(device), self.paints.to(device)
        pixels = patch.flatten(2)  # [B, 3, P]
        energy = pixels.square().sum(dim=(1, 2))  # [B]
        overlaps = torch.einsum("bcp,kmp->bkmc", pixels, masks)
        gram = torch.einsum("kmp,knp->kmn", masks, masks)
        cross = torch.einsum("bkmc,gomc->bgok", overlaps, paints)
        square = torch.einsum("kmn,gomc,gonc->gok", gram, paints, paints)
        filled = energy[:, None, None, None] - 2 * cross + square
        ground = paints[:, 0, 0]  # [backgrounds, 3]
        empty = (pixels[:, None] - ground[None, :, :, None]).square().sum(dim=(2, 3))
        count = pixels.shape[1] * pixels.shape[2]
        return empty / count, filled.clamp(min=0) / count


@cache
def _mask_names(num_shapes: int) -> tuple[tuple[str, str, str, tuple[int, int]], ...]:
    shifts = (-MAX_JITTER, 0, MAX_JITTER)  # a mark has so much contrast that a quarter of a pixel outweighs the shape around it
    return tuple(itertools.product(SHAPES[:num_shapes], SIZES, MARKS, tuple(itertools.product(shifts, shifts))))


@cache
def _templates(height: int, width: int, cells: int, image_size: int, num_colours: int, num_shapes: int) -> _Templates:
    shares = []
    for shape, size, mark, jitter in _mask_names(num_shapes):
        body, dot = coverage(height, width, cells, image_size, shape, size, mark, jitter)
        shares.append(torch.stack([(1 - body) * (1 - dot), body * (1 - dot), dot]).flatten(1))
    grounds, colours, ink = signal(BACKGROUNDS), signal(COLOURS)[:num_colours], inks()[:num_colours]
    paints = torch.stack(
        [
            grounds[:, None].expand(-1, num_colours, -1),
            colours[None].expand(len(grounds), -1, -1),
            ink[None].expand(len(grounds), -1, -1),
        ],
        dim=2,
    )
    return _Templates(torch.stack(shares), paints)
