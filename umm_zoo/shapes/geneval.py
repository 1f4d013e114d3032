"""Prompts of GenEval in miniature: its six categories, what an image must show to fulfil each, and a scene that does.

Reference: Ghosh et al., 2023, arXiv 2310.11513, section 3; its objects are our shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from umm_zoo.shapes.language import NUMBERS, phrase, with_article
from umm_zoo.shapes.relations import relations
from umm_zoo.shapes.scenes import Scene, World, pick, sample_scene

CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
#: The categories in which two shapes stand in one image: the hard ones, to train with if wanted (the task ``couples``).
COUPLES = ("two_objects", "position", "colour_attribution")


class Prompt(NamedTuple):
    """A prompt, the requirement as the shards store it, and a scene that shows what is named and nothing else."""

    text: str
    requirement: dict[str, Any]
    scene: Scene


def make_prompt(world: World, split: str, category: str, rng: np.random.Generator) -> Prompt | None:
    """A random scene and a prompt of a category that it fulfils; None where this scene suits no prompt of the category.

    The requirement is ``{"include": [{"shape", "count", "exact", and "colour" where it is named}, …]}``, with ``"relation"`` where
    the first named lies ``left of``, ``right of``, ``above`` or ``below`` the second. ``exact`` forbids more of them than named.

    Raises:
        ValueError: an unknown category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category: found {category!r}, expected {', '.join(CATEGORIES)}")
    if category == "counting":
        return _counting(world, split, rng)
    count = 1 if category in ("single_object", "colours") else 2
    scene = sample_scene(world, split, rng, count, count)
    items = [scene.objects[i] for i in rng.permutation(len(scene.objects)).tolist()]
    if len(items) < count or len({item.shape for item in items}) < count:
        return None
    coloured = category in ("colours", "colour_attribution")
    names = [with_article(phrase(item, ("colour", "shape") if coloured else ("shape",))) for item in items]
    colours = [{"colour": item.colour} if coloured else {} for item in items]
    wanted = [{"shape": item.shape, "count": 1, "exact": False, **colour} for item, colour in zip(items, colours, strict=True)]
    requirement: dict[str, Any] = {"include": wanted}
    if category != "position":
        return Prompt(" and ".join(names), requirement, scene)
    relation = pick(rng, relations(world.cells, items[0], items[1]))
    return Prompt(f"{names[0]} {relation} {names[1]}", {**requirement, "relation": relation}, scene)


def _counting(world: World, split: str, rng: np.random.Generator) -> Prompt | None:
    most = min(world.max_objects, world.cells**2)
    count = 1 if most < 2 else int(rng.integers(2, most + 1))
    scene = sample_scene(world, split, rng, count, count)
    shape = scene.objects[0].shape
    if len(scene.matching(shape=shape)) < count:
        return None
    noun = f"{shape}s" if count > 1 else shape
    return Prompt(f"{NUMBERS[count]} {noun}", {"include": [{"shape": shape, "count": count, "exact": True}]}, scene)
