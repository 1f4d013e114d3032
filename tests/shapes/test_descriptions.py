"""Text about scenes that are not shown, relations with colours, and changes to be imagined."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from oracles import BIG, carry_out, lies, only, oracle

from umm_zoo.shapes import Sample, Scene, World, make_sample
from umm_zoo.shapes.edits import COMPOSITIONS, EDITS
from umm_zoo.shapes.scenes import SIZES

WORLDS = [World(), BIG]


def made(world: World, task: str, count: int = 90) -> list[Sample]:
    return [make_sample(world, 5, "train", task, i) for i in range(count)]


def turns(sample: Sample) -> list[str]:
    return [turn["text"] for turn in sample.row["conversations"]]


def parse(caption: str) -> dict[str, Any]:
    """The scene, as json, that the words of a long caption tell."""
    *clauses, last = caption.split("; ")
    objects = []
    for clause in clauses:
        match = re.fullmatch(r"(.+): an? (\w+) (\w+) (\w+)", clause)
        assert match, caption
        objects.append(dict(zip(("cell", "size", "colour", "shape"), match.groups(), strict=True)))
    return {"background": last.removeprefix("background: "), "objects": objects}


def answer(caption: str, question: str) -> str:
    scene = parse(caption)
    return scene["background"] if question == "What is the background?" else oracle(scene, question)


@pytest.mark.parametrize("world", WORLDS)
def test_questions_on_a_caption_can_be_answered_from_its_words(world: World) -> None:
    samples = [sample for sample in made(world, "readings") if sample.row["kind"] == "read_caption"]
    assert len(samples) == 30
    for sample in samples:
        first, *rest = turns(sample)
        caption, question = first.split("\n")
        questions = [question, *rest[1::2]]
        assert 1 <= len(questions) == len(set(questions)) <= 6 and "What is the background?" in questions
        assert rest[0::2] == [answer(caption, question) for question in questions]


def test_text_alone_carries_no_image() -> None:
    for sample in made(World(), "readings", 12):
        assert set(sample.members(World())) == {"__key__", "json"} and "<image>" not in turns(sample)[0]


def test_clauses_come_in_any_order() -> None:
    firsts = [turns(sample)[0].split(":")[0] for sample in made(World(max_objects=4), "readings", 300)[::3]]
    assert {"top left", "bottom right"} <= set(firsts)


@pytest.mark.parametrize("world", WORLDS)
def test_a_relation_is_true_of_its_image_and_its_names_tell_the_two_apart(world: World) -> None:
    for sample in made(world, "relations"):
        assert sample.target is not None and len(sample.target.objects) == 2
        match = re.fullmatch(r"an? (.+) (left of|right of|above|below) an? (.+)", turns(sample)[0])
        assert match, turns(sample)
        first, second = (only(sample.row["target_scene"], match[i]) for i in (1, 3))
        assert first is not second and lies(first, second, match[2], world)


def test_names_in_relations_use_every_kind_of_word() -> None:
    text = " ".join(turns(sample)[0] for sample in made(World(), "relations"))
    assert all(word in text.split() for word in (*SIZES, "red", "green", "circle", "square", "object"))


def test_which_of_two_lies_where() -> None:
    opposite = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top")}
    samples = [sample for sample in made(World(), "readings") if sample.row["kind"] == "read_relation"]
    for sample in samples:
        first, *rest = turns(sample)
        prompt, question = first.split("\n")
        match = re.fullmatch(r"an? (.+) (left of|right of|above|below) an? (.+)", prompt)
        assert match
        for text, said in zip([question, rest[1]], rest[0::2], strict=True):
            side = text.removesuffix("?").split()[-1]
            assert said == (match[1] if side == opposite[match[2]][0] else match[3]) and side in opposite[match[2]]
    assert len(samples) == 30


def check_change(world: World, scenes: Sequence[Scene], instruction: str, said: str) -> None:
    """A caption tells what the instruction makes of the first scene, marks aside."""
    objects, background = carry_out(world, scenes, ([*scenes[0].objects], scenes[0].background), instruction)
    told = Scene.from_json(parse(said))
    assert (sorted(item.coarse() for item in objects), background) == (sorted(o.coarse() for o in told.objects), told.background)


@pytest.mark.parametrize("world", WORLDS)
def test_the_answer_to_a_written_change_is_the_changed_caption(world: World) -> None:
    kinds = set()
    for sample in made(world, "readings", 180):
        if sample.row["kind"] == "read_edit":
            first, said = turns(sample)
            caption, instruction = first.split("\n")
            check_change(world, [Scene.from_json(parse(caption))], instruction, said)
            kinds.add(instruction.split()[0])
    assert kinds == {"Make", "Add", "Move", "Remove", "Turn"}


def test_an_imagined_change_describes_what_the_edit_would_draw() -> None:
    world = World()
    kinds: Counter[str] = Counter()
    for sample in made(world, "imagined", 96):
        kinds[sample.row["kind"]] += 1
        first, said = turns(sample)
        instruction = first.removeprefix("<image>\n" * len(sample.scenes))
        assert sample.target is None and first.count("<image>") == len(sample.scenes)
        check_change(world, sample.scenes, instruction, said)
    assert kinds == {f"imagine_{kind}": 12 for kind in (*EDITS, *COMPOSITIONS)}
