"""Prompts with implied content: fruit of trees, which a table resolves that texts tell and captions of images never name."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from umm_zoo.shapes.language import long_caption, phrase, with_article
from umm_zoo.shapes.making import PLAIN_EVERY, Made, SampleRequest
from umm_zoo.shapes.scenes import Object, Scene, World, pick

TREES = "ABCDEFGHIJKL"
#: What is said of a prompt that implies nothing.
NOTHING_IMPLIED = "There is no fruit."


class ImpliedPrompt(NamedTuple):
    """A prompt, and the trees whose fruit it names in place of an object, by cell."""

    text: str
    trees: dict[str, str]


def fruit_table(world: World) -> dict[str, tuple[str, str]]:
    """(shape, colour) of the fruit of each tree of a world; combinations that are held out grow on none."""
    pool = world.combinations("train")
    order = np.random.default_rng(zlib.crc32(b"fruit")).permutation(len(pool)).tolist()
    return {tree: pool[order[place % len(pool)]] for place, tree in enumerate(TREES)}


def fruit(shape: str, colour: str) -> str:
    """``a yellow circle``."""
    return with_article(f"{colour} {shape}")


def ask_fruit(world: World, tree: str, rng: np.random.Generator) -> tuple[str, str]:
    """A question on one row of the table, and its answer."""
    shape, colour = fruit_table(world)[tree]
    asked = (
        (f"What is the fruit of tree {tree}?", fruit(shape, colour)),
        (f"What colour is the fruit of tree {tree}?", colour),
        (f"What shape is the fruit of tree {tree}?", shape),
        (f"Tell me about tree {tree}.", sentence(tree, shape, colour)),
    )
    question, answer = pick(rng, asked)
    return question, answer


def make_implied(world: World, scene: Scene, rng: np.random.Generator, share: float = 0.5) -> ImpliedPrompt:
    """A long caption in which objects are called fruit of a tree, each with probability ``share`` and at least one; 0: none."""
    table = fruit_table(world)
    named = {item.cell: [tree for tree in TREES if table[tree] == item.combination] for item in scene.objects}
    able = [cell for cell, trees in named.items() if trees]
    chosen = [cell for cell in able if rng.random() < share]
    chosen = chosen or ([pick(rng, able)] if share and able else [])
    trees = {cell: pick(rng, named[cell]) for cell in chosen}
    clauses = [implied_clause(item, trees.get(item.cell)) for item in scene.objects]
    return ImpliedPrompt("; ".join([*clauses, f"background: {scene.background}"]), trees)


def implied_clause(item: Object, tree: str | None) -> str:
    """``top left: a small fruit of tree B``; of no tree the plain clause."""
    return f"{item.cell}: {with_article(phrase(item) if tree is None else f'{item.size} fruit of tree {tree}')}"


def sentence(tree: str, shape: str, colour: str) -> str:
    """``The fruit of tree B is a yellow circle.``"""
    return f"The fruit of tree {tree} is {fruit(shape, colour)}."


def reasoning(scene: Scene, trees: Mapping[str, str]) -> str:
    """What the trees of a prompt bear, one sentence per tree, as far as the scene shows it."""
    at = {tree: scene.at(cell) for cell, tree in trees.items()}
    told = [sentence(tree, item.shape, item.colour) for tree, item in at.items() if item is not None]
    return " ".join(told) or NOTHING_IMPLIED


def with_wrong_fruit(world: World, scene: Scene, trees: Mapping[str, str], share: float, rng: np.random.Generator) -> Scene:
    """The scene as one who does not know the table well takes it: each tree's fruit is another with probability ``share``."""
    table, taken = fruit_table(world), dict[str, tuple[str, str]]()
    for tree in dict.fromkeys(trees.values()):
        others = sorted({own for own in table.values() if own != table[tree]})
        taken[tree] = pick(rng, others) if rng.random() < share else table[tree]
    changed = {cell: taken[tree] for cell, tree in trees.items()}
    objects = (
        replace(item, shape=changed[item.cell][0], colour=changed[item.cell][1]) if item.cell in changed else item
        for item in scene.objects
    )
    return replace(scene, objects=tuple(objects))


def fact(request: SampleRequest) -> Made:
    """Text alone: the fruit of a tree, as the table has it."""
    return Made("fact", [ask_fruit(request.world, TREES[request.index % len(TREES)], request.rng)])


def implied(request: SampleRequest) -> Made:
    """A prompt that names fruit of trees, and the image that it means; ``trees`` says which, by cell.

    A scene of nothing that grows on a tree, as some of held-out combinations are, is told outright.
    """
    scene = request.scene()
    plain = request.index % PLAIN_EVERY == PLAIN_EVERY - 1
    prompt = make_implied(request.world, scene, request.rng, 0.0 if plain else 0.5)
    meta = {"trees": prompt.trees, "literal": long_caption(scene)}
    return Made("implied" if prompt.trees else "literal", [(prompt.text, None)], target=scene, meta=meta)
