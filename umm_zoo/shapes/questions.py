"""Questions about one image, each with exactly one right answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from umm_zoo.errors import UserError
from umm_zoo.shapes.language import NUMBERS, refer, with_article
from umm_zoo.shapes.scenes import Scene, World, pick

#: How POPE chooses what it asks for in vain: anything absent, what is common elsewhere, what resembles the objects present.
NEGATIVES = ("random", "popular", "adversarial")
#: Kinds of coarse questions with their shares; existence counts double because it has three settings.
COARSE_SHARES = {"colour": 1, "shape": 1, "size": 1, "count": 1, "position": 1, "exists": 2}
#: Questions are mixed in blocks of this many, so shares and the yes/no balance are exact in every block.
BLOCK = 100
#: Questions about an attribute of the object named.
_TEXTS = {
    "colour": "What colour is the {}?",
    "shape": "What shape is the {}?",
    "size": "What size is the {}?",
    "position": "Where is the {}?",
}


class Question(NamedTuple):
    """A question, its one answer, its kind, and what a metric wants to know besides."""

    text: str
    answer: str
    kind: str
    meta: tuple[tuple[str, Any], ...] = ()


class Slot(NamedTuple):
    """Kind of the question at one place of a block; ``answer`` and ``negative`` are for existence alone."""

    kind: str
    answer: str = ""
    negative: str = ""


@lru_cache(maxsize=4096)
def question_plan(seed: int, stream: int, block: int, mark_share: float) -> tuple[Slot, ...]:
    """The `BLOCK` slots of one block in a random order.

    Args:
        mark_share: share of the questions that ask for the fine detail; the rest keeps `COARSE_SHARES`.

    Raises:
        UserError: the share is not in [0, 1].
    """
    if not 0 <= mark_share <= 1:
        raise UserError("mark_share", str(mark_share), "0 to 1")
    rest = BLOCK - round(BLOCK * mark_share)
    slots = [Slot("mark")] * (BLOCK - rest)
    num_pairs = round(rest * COARSE_SHARES["exists"] / sum(COARSE_SHARES.values()) / 2)
    for i in range(num_pairs):
        negative = NEGATIVES[(i + block) % len(NEGATIVES)]
        slots += [Slot("exists", "yes", negative), Slot("exists", "no", negative)]
    plain = [kind for kind in COARSE_SHARES if kind != "exists"]
    slots += [Slot(plain[(i + block) % len(plain)]) for i in range(rest - 2 * num_pairs)]
    order = np.random.default_rng([seed, stream, block]).permutation(BLOCK).tolist()
    return tuple(slots[i] for i in order)


def ask(world: World, scene: Scene, split: str, slot: Slot, rng: np.random.Generator) -> Question | None:
    """A question of the slot's kind about a scene, or None where this scene has no unambiguous one."""
    if slot.kind == "exists":
        return _exists(world, scene, split, slot, rng)
    if slot.kind == "count":
        return _count(world, scene, rng)
    item = pick(rng, scene.objects)
    attribute = "cell" if slot.kind == "position" else slot.kind
    name = refer(scene, item, rng, avoid=(attribute,))
    if name is None:
        return None
    text = mark_question(world, name) if slot.kind == "mark" else _TEXTS[slot.kind].format(name)
    return Question(text, getattr(item, attribute), slot.kind, (("about", item.cell),))


def ask_several(world: World, scene: Scene, split: str, slots: Iterable[Slot], rng: np.random.Generator) -> dict[str, str]:
    """Different questions about one scene with their answers; fewer than slots where two are alike or one is ambiguous."""
    made = (ask(world, scene, split, slot, rng) for slot in slots)
    return {question.text: question.answer for question in made if question is not None}


def mark_question(world: World, name: str) -> str:
    """The question after the fine detail of an object, by the world's kind of detail."""
    return {
        "mark": f"Where is the mark on the {name}?",
        "stripes": f"Which way do the stripes on the {name} run?",
        "glyph": f"Which glyph is on the {name}?",
    }[world.detail]


def _count(world: World, scene: Scene, rng: np.random.Generator) -> Question:
    wanted: dict[str, str] = {}
    draw = rng.random()
    if draw > 0.7:
        wanted["colour"] = pick(rng, scene.objects).colour
    elif draw > 0.35:
        wanted["shape"] = pick(rng, world.shapes)
    noun = " ".join([*([wanted["colour"]] if "colour" in wanted else []), wanted.get("shape", "object")])
    return Question(f"How many {noun}s are there?", NUMBERS[len(scene.matching(**wanted))], "count")


def _exists(world: World, scene: Scene, split: str, slot: Slot, rng: np.random.Generator) -> Question | None:
    present = sorted({item.combination for item in scene.objects})
    pairs = present if slot.answer == "yes" else absent_pairs(world, scene, split, slot.negative)
    if not pairs:
        return None
    shape, colour = pick(rng, pairs)
    text = f"Is there {with_article(f'{colour} {shape}')}?"
    return Question(text, slot.answer, "exists", (("negative", slot.negative),))


def absent_pairs(world: World, scene: Scene, split: str, negative: str) -> list[tuple[str, str]]:
    """The (shape, colour) pairs that a setting of POPE has questions about in vain.

    ``random``: any that the split may show; ``popular``: the frequent ones; ``adversarial``: those that recombine the
    attributes of objects present, or else share one attribute with one. Outside the held-out split, held-out pairs are
    left out: their answer would always be no.
    """
    present = {item.combination for item in scene.objects}
    absent = [pair for pair in world.combinations(split) if pair not in present]
    if negative == "popular":
        return [pair for pair in absent if pair in world.popular]
    if negative == "adversarial":
        shapes, colours = ({pair[i] for pair in present} for i in (0, 1))
        crossed = [pair for pair in absent if pair[0] in shapes and pair[1] in colours]
        return crossed or [pair for pair in absent if pair[0] in shapes or pair[1] in colours]
    return absent


def mark_pair(world: World, scene: Scene, rng: np.random.Generator) -> tuple[Question, list[tuple[Scene, str]]]:
    """A question, and two scenes with their answers that differ in one object's fine detail alone (MMVP)."""
    item = pick(rng, scene.objects)
    other = replace(item, mark=pick(rng, [mark for mark in world.marks if mark != item.mark]))
    changed = replace(scene, objects=tuple(other if one is item else one for one in scene.objects))
    name = refer(scene, item, rng)
    question = Question(mark_question(world, name or f"object at the {item.cell}"), item.mark, "mark_pair", (("about", item.cell),))
    return question, [(scene, item.mark), (changed, other.mark)]
