"""Scenes, the difficulty of their world, and random scenes that never leak between splits."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from umm_zoo.errors import UserError

#: In the order in which a world takes them; a world of four colours has the first four.
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
SHAPES = ("circle", "square", "triangle", "diamond")
SIZES = ("small", "large")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (128, 128, 128),
    "beige": (206, 196, 172),
    "brown": (98, 78, 62),
    "slate": (72, 86, 102),
}
STRIPES = ("horizontal", "vertical", "rising", "falling")
#: The fine detail of an object, by kind. No caption of the world's own names it.
DETAILS: dict[str, tuple[str, ...]] = {
    "mark": ("top left", "top right", "bottom left", "bottom right"),
    "stripes": STRIPES,
    "glyph": ("plus", "times", "minus", "bar"),
    "none": ("",),
}
PLACES: dict[int, tuple[str, ...]] = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")),
}
#: Largest shift of an object from the middle of its cell in any world, in eighths of a pixel of a 32-px image.
MAX_JITTER = 2
#: Streams of random numbers, one per split. ``hybrid`` has scenes as ``test`` has them, for edits never trained on.
SPLIT_STREAMS = {"train": 0, "val": 1, "test": 2, "heldout": 3, "hybrid": 4}


@dataclass(frozen=True)
class Object:
    """One object.

    ``mark`` is its fine detail (empty: none, or unknown) and ``jitter`` its shift in eighths of a pixel of a 32-px image.
    """

    shape: str
    colour: str
    size: str
    cell: str
    mark: str = ""
    jitter: tuple[int, int] = (0, 0)

    @property
    def combination(self) -> tuple[str, str]:
        """The pair (shape, colour), the unit in which combinations are held out."""
        return self.shape, self.colour

    def coarse(self) -> str:
        """Everything but the fine detail and the jitter, as one string."""
        return f"{self.cell},{self.size},{self.colour},{self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and its objects in reading order; ``stripes`` is the faint texture of the background (empty: none)."""

    background: str
    stripes: str
    objects: tuple[Object, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, the exact ground truth as the shards store it."""
        return {**asdict(self), "objects": [{**asdict(item), "jitter": list(item.jitter)} for item in self.objects]}

    @classmethod
    def from_json(cls, scene: Mapping[str, Any]) -> Scene:
        """The inverse of `to_json`; fine detail, jitter and stripes may be missing."""
        objects = tuple(Object(**{**item, "jitter": tuple(item.get("jitter", (0, 0)))}) for item in scene["objects"])
        return cls(scene["background"], scene.get("stripes", ""), objects)

    def coarse(self) -> str:
        """Everything but the fine detail and the jitter, as one string; splits are made by it."""
        return "|".join((self.background, *(item.coarse() for item in self.objects)))

    def at(self, cell: str) -> Object | None:
        """The object of a cell, if there is one."""
        return next((item for item in self.objects if item.cell == cell), None)

    def matching(self, **attributes: str) -> list[Object]:
        """The objects that have every attribute given, such as ``colour="red"``."""
        return [item for item in self.objects if all(getattr(item, name) == value for name, value in attributes.items())]


@dataclass(frozen=True)
class World:
    """Difficulty of the world: its board, colours, shapes and sizes.

    Args:
        cells: 2 for a board of 2x2 cells, 3 for 3x3; at most one object lies in a cell.
        num_colours: the first 4 to 8 of `COLOURS`.
        num_shapes: the first 2 to 4 of `SHAPES`.
        max_objects: scenes hold 1 to this many objects (1 to 4).
        image_size: 32 or 64 pixels a side.
        detail: ``mark`` (a dot of 2 px at one of four places of each object), ``stripes``, ``glyph`` or ``none``.
        sizes: ``("small", "large")`` or one of the two.
        max_jitter: largest shift of an object from the middle of its cell, in eighths of a pixel of a 32-px image: 0 to 2.
        striped: whether backgrounds carry faint stripes. Without them, jitter and detail, images are mosaics of a few patches
            (``umm_zoo.shapes.patches``).

    Raises:
        UserError: an argument lies outside these ranges.
    """

    cells: int = 2
    num_colours: int = 4
    num_shapes: int = 2
    max_objects: int = 3
    image_size: int = 32
    detail: str = "mark"
    sizes: tuple[str, ...] = SIZES
    max_jitter: int = MAX_JITTER
    striped: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        expected: dict[str, tuple[Any, ...]] = {
            "cells": tuple(PLACES),
            "num_colours": tuple(range(4, len(COLOURS) + 1)),
            "num_shapes": tuple(range(2, len(SHAPES) + 1)),
            "max_objects": (1, 2, 3, 4),
            "image_size": (32, 64),
            "detail": tuple(DETAILS),
            "sizes": (SIZES, ("small",), ("large",)),
            "max_jitter": tuple(range(MAX_JITTER + 1)),
            "striped": (True, False),
        }
        for name, values in expected.items():
            if getattr(self, name) not in values:
                raise UserError(f"World.{name}", repr(getattr(self, name)), ", ".join(map(str, values)))

    @cached_property
    def colours(self) -> tuple[str, ...]:
        """Names of the colours of this world."""
        return tuple(COLOURS)[: self.num_colours]

    @cached_property
    def shapes(self) -> tuple[str, ...]:
        """Names of the shapes of this world."""
        return SHAPES[: self.num_shapes]

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the cells in reading order."""
        return PLACES[self.cells]

    @property
    def marks(self) -> tuple[str, ...]:
        """The values that the fine detail of an object can take."""
        return DETAILS[self.detail]

    @property
    def has_detail(self) -> bool:
        """Whether objects have a fine detail that can be asked for."""
        return any(self.marks)

    @property
    def stripes(self) -> tuple[str, ...]:
        """The textures that a background can have."""
        return STRIPES if self.striped else ("",)

    @property
    def most_scenes(self) -> int:
        """How many different images there can be at most: pairs of colour and shape that are held out of training count too."""
        shifts = (2 * self.max_jitter + 1) ** 2
        looks = self.num_colours * self.num_shapes * len(self.sizes) * len(self.marks) * shifts
        boards = sum(math.comb(len(self.places), count) * looks**count for count in range(1, self.max_objects + 1))
        return boards * len(BACKGROUNDS) * len(self.stripes)

    @cached_property
    def heldout(self) -> frozenset[tuple[str, str]]:
        """One (shape, colour) of each shape that train, val and test never show; every colour still appears there."""
        return frozenset((shape, self.colours[(2 * i + 3) % self.num_colours]) for i, shape in enumerate(self.shapes))

    @cached_property
    def popular(self) -> frozenset[tuple[str, str]]:
        """One (shape, colour) of each shape that appears twice as often as the others (POPE's popular negatives)."""
        return frozenset((shape, self.colours[2 * i % self.num_colours]) for i, shape in enumerate(self.shapes))

    @cached_property
    def _weighted(self) -> dict[bool, tuple[tuple[str, str], ...]]:
        every = [(shape, colour) for shape in self.shapes for colour in self.colours]
        heavy = [pair for pair in every for _ in range(2 if pair in self.popular else 1)]
        return {True: tuple(heavy), False: tuple(pair for pair in heavy if pair not in self.heldout)}

    def combinations(self, split: str) -> tuple[tuple[str, str], ...]:
        """The (shape, colour) pairs that a split may show, without repeats."""
        return tuple(dict.fromkeys(self._weighted[split == "heldout"]))

    def to_json(self) -> dict[str, Any]:
        """The arguments as plain values, for ``world.json``."""
        return {**asdict(self), "sizes": list(self.sizes)}


def sample_stream(seed: int, split: str, task: str, index: int) -> np.random.Generator:
    """The random numbers of one sample: a pure function of its four names, shared with no other sample."""
    return np.random.default_rng([seed, SPLIT_STREAMS[split], zlib.crc32(task.encode()), index])


def split_of(scene: Scene) -> str:
    """The split to which a scene without held-out combinations belongs: 80% train, 10% val, 10% test.

    It is decided by the scene's coarse content alone, so a test scene has no twin in train under any seed, and two
    scenes that differ only in a mark lie in the same split.
    """
    bucket = zlib.crc32(scene.coarse().encode()) % 10
    return "train" if bucket < 8 else "val" if bucket == 8 else "test"


def pick(rng: np.random.Generator, values: Any) -> Any:
    """One of a sequence, uniformly; unlike ``rng.choice`` it keeps the type and is quick on short sequences."""
    return values[int(rng.random() * len(values))]


def random_jitter(world: World, rng: np.random.Generator) -> tuple[int, int]:
    """A shift in eighths of a pixel, each axis uniform in [-max_jitter, max_jitter]."""
    dx, dy = rng.integers(-world.max_jitter, world.max_jitter + 1, size=2).tolist()
    return dx, dy


def sample_scene(world: World, split: str, rng: np.random.Generator, min_objects: int = 1, max_objects: int | None = None) -> Scene:
    """Random scene of a split; ``max_objects`` None takes the world's.

    Raises:
        UserError: none of 10,000 random scenes is of this split.
    """
    most = min(world.max_objects if max_objects is None else max_objects, world.cells**2)
    wanted = "test" if split == "hybrid" else split
    for _ in range(10_000):
        scene = _draw(world, split, rng, min(min_objects, most), most)
        if split == "heldout" or split_of(scene) == wanted:
            return scene
    raise UserError("", f"the world {world.to_json()} has no scene of {min_objects} to {most} objects in the split {split!r}")


def _draw(world: World, split: str, rng: np.random.Generator, least: int, most: int) -> Scene:
    count = least + int(rng.random() * (most - least + 1))
    cells = np.sort(rng.permutation(world.cells**2)[:count]).tolist()
    pool = world._weighted[split == "heldout"]
    choice = rng.random((count, 3)).tolist()
    shifts = rng.integers(-world.max_jitter, world.max_jitter + 1, size=(count, 2)).tolist()
    objects = []
    for cell, (a, b, c), (dx, dy) in zip(cells, choice, shifts, strict=True):
        shape, colour = pool[int(a * len(pool))]
        size = world.sizes[int(b * len(world.sizes))]
        objects.append(Object(shape, colour, size, world.places[cell], world.marks[int(c * len(world.marks))], (dx, dy)))
    if split == "heldout" and not any(item.combination in world.heldout for item in objects):
        lucky = int(rng.random() * count)
        shape, colour = pick(rng, sorted(world.heldout))
        objects[lucky] = replace(objects[lucky], shape=shape, colour=colour)
    background = tuple(BACKGROUNDS)[int(rng.random() * len(BACKGROUNDS))]
    return Scene(background, pick(rng, world.stripes), tuple(objects))
