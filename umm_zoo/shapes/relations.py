"""Two objects and where they lie to each other, told in words: prompts to train with, from easy to hard."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from umm_zoo.shapes.language import phrase, refer, with_article
from umm_zoo.shapes.scenes import PLACES, Object, Scene, World, pick, sample_scene

RELATIONS = ("left of", "right of", "above", "below")

#: The prompt, the relation, the names of both objects, and the scene.
Told = tuple[str, str, tuple[str, str], Scene]


def make_relation(world: World, split: str, rng: np.random.Generator) -> Told | None:
    """Two objects, each by any words that tell it from the other, and where they lie to each other.

    The prompts of position in GenEval name shapes alone, and two shapes differ in so few pixels that a generator hardly learns from
    them what ``above`` means; beside a colour it does.

    Returns:
        None where two alike were drawn.
    """
    return _tell(world, split, rng, lambda scene, item: refer(scene, item, rng, avoid=("cell",)))


def make_colour_relation(world: World, split: str, rng: np.random.Generator) -> Told | None:
    """Two objects of two colours, each named by its colour, with its shape or without.

    The easiest to learn to draw: two colours are as far apart in an image as anything is, and no size or shape is needed to tell
    which object is which.

    Returns:
        None where two of one colour were drawn.
    """

    def name(scene: Scene, item: Object) -> str | None:
        if len(scene.matching(colour=item.colour)) > 1:
            return None
        return phrase(item, pick(rng, (("colour",), ("colour", "shape"))))

    return _tell(world, split, rng, name)


def make_tied_relation(world: World, split: str, rng: np.random.Generator) -> Told | None:
    """Two objects named by their shapes alone, in a scene in which every shape has one colour; to train with before the true ones.

    Two shapes differ in so few pixels that a generator hardly learns from them which words ask for which place. Here the words make
    a difference as large as a colour's. In scenes of all colours it then has to learn that they did not ask for a colour.

    Returns:
        None where two of one shape or an object of another colour were drawn.
    """
    tied = tied_colours(world, split)

    def name(scene: Scene, item: Object) -> str | None:
        return phrase(item, ("shape",)) if len(scene.matching(shape=item.shape)) == 1 else None

    told = _tell(world, split, rng, name)
    return told if told is not None and all(item.colour == tied[item.shape] for item in told[-1].objects) else None


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


def _tell(world: World, split: str, rng: np.random.Generator, name: Callable[[Scene, Object], str | None]) -> Told | None:
    """A scene of two objects and one relation that holds; None where one of them has no name."""
    scene = sample_scene(world, split, rng, 2, 2)
    first, second = (scene.objects[i] for i in rng.permutation(2).tolist())
    names = [name(scene, item) for item in (first, second)]
    if names[0] is None or names[1] is None:
        return None
    relation = pick(rng, relations(world.cells, first, second))
    return f"{with_article(names[0])} {relation} {with_article(names[1])}", relation, (names[0], names[1]), scene
