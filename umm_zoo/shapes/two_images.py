"""Questions about two images: the same or not, which one, how many together, and what was changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from umm_zoo.shapes.edits import EDITS, make_edit
from umm_zoo.shapes.language import NUMBERS, with_article
from umm_zoo.shapes.questions import Question
from umm_zoo.shapes.scenes import Scene, World, pick, random_jitter, sample_scene

TWO_IMAGE_KINDS = ("two_same", "two_which", "two_count", "describe_edit")


def ask_two(world: World, split: str, index: int, rng: np.random.Generator) -> tuple[tuple[Scene, Scene], Question] | None:
    """Two scenes and a question about both; None where this draw has no unambiguous one.

    Kinds follow each other in turn with ``index``, and so do yes and no, first and second: both are exactly balanced.
    """
    kind = TWO_IMAGE_KINDS[index % len(TWO_IMAGE_KINDS)]
    turn = index // len(TWO_IMAGE_KINDS)
    first = sample_scene(world, split, rng)
    if kind == "describe_edit":
        edit = make_edit(world, first, split, EDITS[turn % len(EDITS)], rng)
        if edit is None:
            return None
        text = "What changed from the first image to the second?"
        return (first, edit.target), Question(text, edit.description or edit.order, kind, (("edit", edit.kind),))
    if kind == "two_same":
        answer, second = "yes", first
        if turn % 2:
            edit = make_edit(world, first, split, EDITS[turn // 2 % len(EDITS)], rng)
            if edit is None:
                return None
            answer, second = "no", edit.target
        # New jitter in either case, so that comparing pixels does not answer the question.
        second = replace(second, objects=tuple(replace(item, jitter=random_jitter(world, rng)) for item in second.objects))
        return (first, second), Question("Do the two images show the same scene?", answer, kind)
    second = sample_scene(world, split, rng)
    if kind == "two_count":
        shape = pick(rng, (*world.shapes, None))
        count = sum(len(scene.matching(**({"shape": shape} if shape else {}))) for scene in (first, second))
        text = f"How many {shape or 'object'}s are there in both images together?"
        return (first, second), Question(text, NUMBERS[count], kind)
    has, lacks = (first, second) if turn % 2 == 0 else (second, first)
    only = sorted({item.combination for item in has.objects} - {item.combination for item in lacks.objects})
    if not only:
        return None
    shape, colour = pick(rng, only)
    answer = "first" if turn % 2 == 0 else "second"
    return (first, second), Question(f"Which image has {with_article(f'{colour} {shape}')}?", answer, kind)
