"""Renderer of scenes: anti-aliased by supersampling, quick because every mask is computed once and kept.

Objects are painted inside their own cell and nowhere else, so whatever an edit leaves alone stays identical pixel for pixel.
"""

from __future__ import annotations

import io
import itertools
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from umm_zoo.shapes.scenes import BACKGROUNDS, COLOURS, PLACES, Scene, World

#: Sub-samples per pixel and axis.
SUPERSAMPLING = 6
#: Radius of an object as a share of half the smallest cell.
RADII = {"small": 0.62, "large": 0.84}
#: Where the four marks lie, in radii from the object's middle; inside each shape with the dot's own radius to spare.
MARK_OFFSETS: dict[str, dict[str, tuple[float, float]]] = {
    "circle": {"top": (0.42, -0.42), "bottom": (0.42, 0.42)},
    "square": {"top": (0.45, -0.45), "bottom": (0.45, 0.45)},
    "triangle": {"top": (0.32, 0.0), "bottom": (0.64, 0.58)},
    "diamond": {"top": (0.38, -0.38), "bottom": (0.38, 0.38)},
}
DARK, LIGHT = (15, 15, 15), (250, 250, 250)
#: Level by which the faint stripes of a background rise and fall.
STRIPE_LEVEL = 9.0


@cache
def cell_boxes(cells: int, image_size: int) -> dict[str, tuple[slice, slice]]:
    """Rows and columns of every cell by its name, in reading order, to index an image ``[H, W, …]``.

    Edges are whole numbers: 0, 11, 21, 32 for 3x3 cells at 32 px.
    """
    edges = [round(i * image_size / cells) for i in range(cells + 1)]
    spans = [slice(*edge) for edge in itertools.pairwise(edges)]
    return {place: (spans[i // cells], spans[i % cells]) for i, place in enumerate(PLACES[cells])}


def render(world: World, scene: Scene) -> np.ndarray:
    """Image of a scene.

    Shape:
        - output: ``[H, W, 3]`` uint8, H = W = ``world.image_size``
    """
    image = _background(world.image_size, scene.background, scene.stripes).copy()
    boxes = cell_boxes(world.cells, world.image_size)
    for item in scene.objects:
        patch = image[boxes[item.cell]]
        box, form = patch.shape[:2], (item.shape, item.size, item.mark, item.jitter)
        body, detail = coverage(box, world.cells, world.image_size, world.detail, *form)
        patch += body * (np.array(COLOURS[item.colour], np.float32) - patch)
        patch += detail * (np.array(ink(item.colour), np.float32) - patch)
    return (image + 0.5).astype(np.uint8)


def ink(colour: str) -> tuple[int, int, int]:
    """Colour of the detail of an object: light on dark colours, dark on light ones."""
    red, green, blue = COLOURS[colour]
    return DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else LIGHT


def encode_png(image: np.ndarray) -> bytes:
    """An image ``[H, W, 3]`` uint8 as PNG bytes, lightly compressed because a tiny image gains nothing from more."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the sub-samples, in pixels from the top left corner, ``[height * S, 1]`` and ``[1, width * S]``."""
    ys = (np.arange(height * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    xs = (np.arange(width * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    return ys[:, None], xs[None, :]


def _share(inside: np.ndarray) -> np.ndarray:
    """Share of each pixel's sub-samples that lie inside, ``[h, w, 1]``."""
    height, width = (length // SUPERSAMPLING for length in inside.shape)
    blocks = inside.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3), dtype=np.float32)[:, :, None]


def _across(orientation: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The coordinate that runs across stripes of an orientation; ``rising`` stripes climb to the right."""
    diagonal = 0.5**0.5
    across = {"horizontal": y + 0 * x, "vertical": x + 0 * y, "rising": (x + y) * diagonal, "falling": (x - y) * diagonal}
    return across[orientation]


@lru_cache(maxsize=64)
def _background(image_size: int, colour: str, stripes: str) -> np.ndarray:
    plain = np.full((image_size, image_size, 3), BACKGROUNDS[colour], np.float32)
    if not stripes:
        return plain
    y, x = _grid(image_size, image_size)
    period = 4.0 * image_size / 32
    light = _share(np.floor(2 * _across(stripes, y, x) / period) % 2 == 0)
    return plain + STRIPE_LEVEL * (2 * light - 1)


@lru_cache(maxsize=65536)
def coverage(
    box: tuple[int, ...], cells: int, image_size: int, detail: str, shape: str, size: str, mark: str, jitter: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the pixels of a cell of ``box`` (height, width) that an object and its detail cover, both ``[h, w, 1]``."""
    height, width = box
    pixel = image_size / 32
    radius = RADII[size] * (image_size // cells) / 2
    y, x = _grid(height, width)
    y = y - height / 2 - jitter[1] / 8 * pixel
    x = x - width / 2 - jitter[0] / 8 * pixel
    body = _inside(shape, y / radius, x / radius)
    if not mark:
        sign = np.zeros_like(body)
    elif detail == "mark":
        vertical, horizontal = mark.split()
        dx, dy = MARK_OFFSETS[shape][vertical]
        dx = -dx if horizontal == "left" else dx
        sign = (x - dx * radius) ** 2 + (y - dy * radius) ** 2 <= pixel**2
    elif detail == "stripes":
        sign = np.floor(2 * _across(mark, y, x) / (2.6 * pixel) + 0.5) % 2 == 0
    else:
        sign = _glyph(mark, y - (0.3 * radius if shape == "triangle" else 0), x, pixel)
    return _share(body), _share(sign & body)


def _inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points lie inside a shape of unit radius; the four have about the same area."""
    if shape == "circle":
        return x**2 + y**2 <= 0.95**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.83
    if shape == "diamond":
        return abs(x) + abs(y) <= 1.12
    return (y <= 0.95) & (abs(x) <= 1.1 * (y + 1.1) / 2.05)  # the triangle: apex at the top, base below


def _glyph(glyph: str, y: np.ndarray, x: np.ndarray, pixel: float) -> np.ndarray:
    """A sign of about 4 px with strokes of 1.2 px."""
    if glyph == "times":  # a plus turned by 45 degrees
        y, x = (x + y) * 0.5**0.5, (x - y) * 0.5**0.5
    minus, bar = ((abs(across) <= 0.6 * pixel) & (abs(along) <= 2.0 * pixel) for across, along in ((y, x), (x, y)))
    return {"minus": minus, "bar": bar}.get(glyph, minus | bar)
