"""Geometry and colours of the synthetic shapes world, as far as finding its objects in an image needs them.

The world itself is drawn by ``data_pipelines.shapes``, which nothing here imports; a test compares the two pixel by pixel.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 230),
    "yellow": (245, 220, 50),
    "purple": (150, 55, 185),
    "orange": (245, 140, 25),
    "cyan": (60, 210, 220),
    "pink": (250, 150, 195),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (128, 128, 128),
    "beige": (206, 196, 172),
    "brown": (98, 78, 62),
    "slate": (72, 86, 102),
}
SHAPES = ("circle", "square", "triangle", "diamond")
SIZES = ("small", "large")
#: Largest shift of an object from the middle of its cell, in eighths of a pixel of a 32-px image.
MAX_JITTER = 2
MARKS = ("top left", "top right", "bottom left", "bottom right")
PLACES: dict[int, tuple[str, ...]] = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")),
}
DARK, LIGHT = (15, 15, 15), (250, 250, 250)

_SUPERSAMPLING = 6
_RADII = {"small": 0.62, "large": 0.84}
_MARK_OFFSETS = {
    "circle": ((0.42, -0.42), (0.42, 0.42)),
    "square": ((0.45, -0.45), (0.45, 0.45)),
    "triangle": ((0.32, 0.0), (0.64, 0.58)),
    "diamond": ((0.38, -0.38), (0.38, 0.38)),
}


def signal(colours: dict[str, tuple[int, int, int]]) -> Tensor:
    """Colours as rows of ``[K, 3]`` in [-1, 1]."""
    return torch.tensor(list(colours.values()), dtype=torch.float32) / 127.5 - 1


def inks() -> Tensor:
    """The colour of the mark on an object of each of ``COLOURS``, ``[8, 3]`` in [-1, 1]: dark on light ones, light on dark ones."""
    dark = [0.299 * red + 0.587 * green + 0.114 * blue > 128 for red, green, blue in COLOURS.values()]
    return torch.tensor([DARK if is_dark else LIGHT for is_dark in dark], dtype=torch.float32) / 127.5 - 1


def cell_boxes(cells: int, image_size: int) -> dict[str, tuple[slice, slice]]:
    """Rows and columns of every cell by its name, in reading order."""
    edges = [round(i * image_size / cells) for i in range(cells + 1)]
    spans = [slice(edges[i], edges[i + 1]) for i in range(cells)]
    return {place: (spans[i // cells], spans[i % cells]) for i, place in enumerate(PLACES[cells])}


@cache
def coverage(
    height: int, width: int, cells: int, image_size: int, shape: str, size: str, mark: str, jitter: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """How much of each pixel of a cell an object covers, and how much its mark does, ``[height, width]`` each.

    Args:
        height: of the cell, in pixels.
        width: of the cell.
        cells: of the board, per side.
        image_size: of the image.
        shape: one of ``SHAPES``.
        size: one of ``SIZES``.
        mark: one of ``MARKS``.
        jitter: shift from the cell's middle to the right and down, in eighths of a pixel of a 32-px image.
    """
    pixel, radius = image_size / 32, _RADII[size] * (image_size // cells) / 2
    y = (torch.arange(height * _SUPERSAMPLING, dtype=torch.float64)[:, None] + 0.5) / _SUPERSAMPLING - height / 2
    y = y - jitter[1] / 8 * pixel
    x = (torch.arange(width * _SUPERSAMPLING, dtype=torch.float64)[None, :] + 0.5) / _SUPERSAMPLING - width / 2
    x = x - jitter[0] / 8 * pixel
    body = _inside(shape, y / radius, x / radius)
    vertical, horizontal = mark.split()
    dx, dy = _MARK_OFFSETS[shape][("top", "bottom").index(vertical)]
    dx = -dx if horizontal == "left" else dx
    dot = (x - dx * radius) ** 2 + (y - dy * radius) ** 2 <= pixel**2
    return _share(body), _share(body & dot)


def _share(inside: Tensor) -> Tensor:
    height, width = (length // _SUPERSAMPLING for length in inside.shape)
    return inside.float().reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING).mean(dim=(1, 3))


def _inside(shape: str, y: Tensor, x: Tensor) -> Tensor:
    if shape == "circle":
        return x**2 + y**2 <= 0.95**2
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) <= 0.83
    if shape == "diamond":
        return x.abs() + y.abs() <= 1.12
    return (y <= 0.95) & (x.abs() <= 1.1 * (y + 1.1) / 2.05)
