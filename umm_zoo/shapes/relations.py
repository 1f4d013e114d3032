"""Prompts for two objects and where they lie to each other, to train with, from easy to hard."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from umm_zoo.shapes.language import phrase, refer, with_article
from umm_zoo.shapes.scenes import PLACES, Object, Scene, World, pick, sample_scene

RELATIONS = ("left of", "right of", "above", "below")


class RelationPrompt(NamedTuple):
    """A prompt, the relation it names, the names of both objects, and a scene that shows them and nothing else."""

    text: str
    relation: str
    names: tuple[str, str]
    scene: Scene


def make_relation(world: World, split: str, rng: np.random.Generator) -> RelationPrompt | None:
    """Two objects, each by any words that tell it from the other, and where they lie; None where the two are alike.

    The prompts of position in GenEval name shapes alone, and two shapes differ in so few pixels that a generator hardly learns from
    them what ``above`` means; beside a colour it does.
    """
    return _prompt(world, split, rng, lambda scene, item: refer(scene, item, rng, avoid=("cell",)))


def make_colour_relation(world: World, split: str, rng: np.random.Generator) -> RelationPrompt | None:
    """Two objects, each named by its colour, with its shape or without; None where the two have one colour.

    The easiest to learn: two colours are as far apart in an image as anything is, and no size or shape is needed to tell which
    object is which.
    """

    def name(scene: Scene, item: Object) -> str | None:
        if len(scene.matching(colour=item.colour)) > 1:
            return None
        return phrase(item, pick(rng, (("colour",), ("colour", "shape"))))

    return _prompt(world, split, rng, name)


def make_tied_relation(world: World, split: str, rng: np.random.Generator) -> RelationPrompt | None:
    """Two objects named by their shapes alone, in a scene in which every shape has one colour; to train with before the true ones.

    Two shapes differ in so few pixels that a generator hardly learns from them which words ask for which place. Here the words make
    a difference as large as a colour's. In scenes of all colours it then has to learn that they did not ask for a colour. None
    where the two have one shape, or one has another colour than its shape's.
    """
    tied = tied_colours(world, split)

    def name(scene: Scene, item: Object) -> str | None:
        return phrase(item, ("shape",)) if len(scene.matching(shape=item.shape)) == 1 else None

    prompt = _prompt(world, split, rng, name)
    return prompt if prompt and all(item.colour == tied[item.shape] for item in prompt.scene.objects) else None


def tied_colours(world: World, split: str) -> dict[str, str]:
    """A colour of its own for every shape; of pairs that are held out only in the split that is made of them."""
    tied: dict[str, str] = {}
    for shape in world.shapes:
        free = [colour for colour in world.colours if colour not in tied.values()]
        tied[shape] = next((c for c in free if ((shape, c) in world.heldout) == (split == "heldout")), free[0])
    return tied


def relations(cells: int, first: Object, second: Object) -> list[str]:
    """The relations that hold between the cells of two objects of a board of so many cells a side; at least one does."""
    (row, column), (other_row, other_column) = (divmod(PLACES[cells].index(item.cell), cells) for item in (first, second))
    holds = (column < other_column, column > other_column, row < other_row, row > other_row)
    return [relation for relation, is_so in zip(RELATIONS, holds, strict=True) if is_so]


def _prompt(
    world: World, split: str, rng: np.random.Generator, name: Callable[[Scene, Object], str | None]
) -> RelationPrompt | None:
    """A scene of two objects and one relation that holds; None where one of them has no name."""
    scene = sample_scene(world, split, rng, 2, 2)
    first, second = (scene.objects[i] for i in rng.permutation(2).tolist())
    one, other = name(scene, first), name(scene, second)
    if one is None or other is None:
        return None
    relation = pick(rng, relations(world.cells, first, second))
    return RelationPrompt(f"{with_article(one)} {relation} {with_article(other)}", relation, (one, other), scene)
