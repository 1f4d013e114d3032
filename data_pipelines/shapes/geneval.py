"""GenEval in miniature: prompts of its six categories, what a picture must show to fulfil each, and a scene that does.

Reference: Ghosh et al., 2023, arXiv 2310.11513, section 3; its objects are our shapes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipelines.shapes.language import NUMBERS, phrase, plural, refer, with_article
from data_pipelines.shapes.world import Object, Scene, World, pick, sample_scene

CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
#: The categories in which two shapes stand in one picture: the hard ones, to train with if wanted (the task ``couples``).
COUPLES = ("two_objects", "position", "colour_attribution")
RELATIONS = ("left of", "right of", "above", "below")

#: A prompt, the requirement as the shards store it, and a scene that shows what is named and nothing else.
Task = tuple[str, dict[str, Any], Scene]


def make_task(world: World, split: str, category: str, rng: np.random.Generator) -> Task | None:
    """Draw a scene and a prompt of a category that it fulfils; None where this scene suits no prompt of the category.

    The requirement is ``{"include": [{"shape", "count", "exact", and "colour" where it is named}, …]}``, with ``"relation"`` where
    the first named lies ``left of``, ``right of``, ``above`` or ``below`` the second. ``exact`` forbids more of them than named.

    Raises:
        ValueError: an unknown category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category: found {category!r}, accepted {', '.join(CATEGORIES)}")
    if category == "counting":
        return _counting(world, split, rng)
    count = 1 if category in ("single_object", "colours") else 2
    scene = sample_scene(world, split, rng, count, count)
    items = [scene.objects[i] for i in rng.permutation(len(scene.objects)).tolist()]
    if len(items) < count or len({item.shape for item in items}) < count:
        return None
    coloured = category in ("colours", "colour_attribution")
    names = [with_article(phrase(item, ("colour", "shape") if coloured else ("shape",))) for item in items]
    requirement: dict[str, Any] = {"include": [_wanted(item, coloured) for item in items]}
    if category != "position":
        return " and ".join(names), requirement, scene
    relation = pick(rng, relations(world, items[0], items[1]))
    return f"{names[0]} {relation} {names[1]}", {**requirement, "relation": relation}, scene


def make_relation(world: World, split: str, rng: np.random.Generator) -> tuple[str, str, tuple[str, str], Scene] | None:
    """Two objects, each by any words that tell it from the other, and where they lie to each other; to train with.

    The benchmark's own prompts of position name shapes alone, and two shapes differ in so few pixels that a generator hardly learns
    from them what ``above`` means; beside a colour it does.

    Returns:
        The prompt, the relation, the names of both, and the scene; None where two alike were drawn.
    """
    scene = sample_scene(world, split, rng, 2, 2)
    first, second = (scene.objects[i] for i in rng.permutation(2).tolist())
    names = [refer(scene, item, rng, avoid=("cell",)) for item in (first, second)]
    if names[0] is None or names[1] is None:
        return None
    relation = pick(rng, relations(world, first, second))
    return f"{with_article(names[0])} {relation} {with_article(names[1])}", relation, (names[0], names[1]), scene


def make_colour_relation(world: World, split: str, rng: np.random.Generator) -> tuple[str, str, tuple[str, str], Scene] | None:
    """Two objects of two colours, each named by its colour, with its shape or without, and where they lie to each other.

    The easiest relations to learn to draw: two colours are as far apart in a picture as anything is, and no size or shape is needed
    to tell which object is which.

    Returns:
        As `make_relation`; None where two of one colour were drawn.
    """
    scene = sample_scene(world, split, rng, 2, 2)
    first, second = (scene.objects[i] for i in rng.permutation(2).tolist())
    if first.colour == second.colour:
        return None
    names = [phrase(item, pick(rng, (("colour",), ("colour", "shape")))) for item in (first, second)]
    relation = pick(rng, relations(world, first, second))
    return f"{with_article(names[0])} {relation} {with_article(names[1])}", relation, (names[0], names[1]), scene


def make_tied_relation(world: World, split: str, rng: np.random.Generator) -> Task | None:
    """A prompt of GenEval's ``position`` and a scene in which every shape has one colour; to train with before the true ones.

    Two shapes differ in so few pixels that a generator hardly learns from them which words ask for which place. Here the words make
    a difference as large as a colour's. In scenes of all colours it then has to learn that they did not ask for a colour.

    Returns:
        As `make_task`.
    """
    task = make_task(world, split, "position", rng)
    tied = tied_colours(world, split)
    return task if task is not None and all(item.colour == tied[item.shape] for item in task[-1].objects) else None


def tied_colours(world: World, split: str) -> dict[str, str]:
    """A colour of its own for every shape; of pairs that are held out only in the split that is made of them."""
    tied: dict[str, str] = {}
    for shape in world.shapes:
        free = [colour for colour in world.colours if colour not in tied.values()]
        tied[shape] = next((c for c in free if ((shape, c) in world.heldout) == (split == "heldout")), free[0])
    return tied


def relations(world: World, first: Object, second: Object) -> list[str]:
    """Which relations hold between the cells of two objects; at least one does."""
    (row, column), (other_row, other_column) = (divmod(world.places.index(item.cell), world.cells) for item in (first, second))
    holds = (column < other_column, column > other_column, row < other_row, row > other_row)
    return [relation for relation, is_so in zip(RELATIONS, holds, strict=True) if is_so]


def _counting(world: World, split: str, rng: np.random.Generator) -> Task | None:
    most = min(world.max_objects, world.cells**2)
    count = 1 if most < 2 else int(rng.integers(2, most + 1))
    scene = sample_scene(world, split, rng, count, count)
    shape = scene.objects[0].shape
    if len(scene.matching(shape=shape)) < count:
        return None
    noun = plural(shape) if count > 1 else shape
    return f"{NUMBERS[count]} {noun}", {"include": [{"shape": shape, "count": count, "exact": True}]}, scene


def _wanted(item: Object, coloured: bool) -> dict[str, Any]:
    wanted: dict[str, Any] = {"shape": item.shape, "count": 1, "exact": False}
    return {**wanted, "colour": item.colour} if coloured else wanted
