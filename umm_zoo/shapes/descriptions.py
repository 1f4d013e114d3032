"""Texts about scenes that are not shown: a description, a relation or a change, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from umm_zoo.shapes.edits import EDITS, make_edit
from umm_zoo.shapes.language import long_caption
from umm_zoo.shapes.questions import COARSE_SHARES, NEGATIVES, Slot, ask_several
from umm_zoo.shapes.relations import make_relation
from umm_zoo.shapes.scenes import World, pick, sample_scene

#: Questions on one description, fewer where two are alike.
CAPTION_TURNS = 6
#: Which of two is meant, for each relation of the first to the second: a question, and the number of the one it asks for.
_SIDES = {
    "left of": (("Which is on the left?", 0), ("Which is on the right?", 1)),
    "right of": (("Which is on the left?", 1), ("Which is on the right?", 0)),
    "above": (("Which is at the top?", 0), ("Which is at the bottom?", 1)),
    "below": (("Which is at the top?", 1), ("Which is at the bottom?", 0)),
}

#: Questions and answers in order; the text that they are about stands before the first question.
Turns = list[tuple[str, str]]


def about_caption(world: World, split: str, rng: np.random.Generator) -> Turns | None:
    """A long caption with its clauses in any order, and questions on it, the background among them; never the mark."""
    scene = sample_scene(world, split, rng)
    kinds, answers = tuple(COARSE_SHARES), ("yes", "no")
    slots = (Slot(pick(rng, kinds), pick(rng, answers), pick(rng, NEGATIVES)) for _ in range(CAPTION_TURNS - 1))
    pairs = [("What is the background?", scene.background), *ask_several(world, scene, split, slots, rng).items()]
    turns = [pairs[i] for i in rng.permutation(len(pairs)).tolist()]
    return _after(long_caption(scene, rng), turns)


def about_relation(world: World, split: str, rng: np.random.Generator) -> Turns | None:
    """``a red circle above a blue square``, and which of the two lies where; None where the two are alike."""
    made = make_relation(world, split, rng)
    if made is None:
        return None
    turns = [(question, made.names[which]) for question, which in _SIDES[made.relation]]
    return _after(made.text, [turns[i] for i in rng.permutation(2).tolist()])


def about_edit(world: World, split: str, rng: np.random.Generator) -> Turns | None:
    """A long caption and an instruction, answered by the caption of what results; None where the scene allows no such edit."""
    scene = sample_scene(world, split, rng, max_objects=max(1, world.max_objects - 1))
    edit = make_edit(world, scene, split, pick(rng, EDITS), rng)
    return None if edit is None else _after(long_caption(scene), [(edit.instruction, long_caption(edit.target))])


def _after(text: str, turns: Turns) -> Turns:
    (question, answer), *more = turns
    return [(f"{text}\n{question}", answer), *more]


#: By the kind that the samples of the task ``readings`` name.
TEXT_KINDS: dict[str, Callable[[World, str, np.random.Generator], Turns | None]] = {
    "read_caption": about_caption,
    "read_relation": about_relation,
    "read_edit": about_edit,
}
