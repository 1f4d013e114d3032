"""Text about scenes that are not shown, relations with colours, and changes to be imagined."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from umm_zoo.shapes import Sample, Scene, World, make_sample
from umm_zoo.shapes.edits import COMPOSITIONS, EDITS
from umm_zoo.shapes.scenes import SIZES

WORLDS = [World(), World(cells=3, num_colours=8, num_shapes=4, max_objects=4)]
NUMBERS = ["zero", "one", "two", "three", "four"]


def made(world: World, task: str, count: int = 90) -> list[Sample]:
    return [make_sample(world, 5, "train", task, i) for i in range(count)]


def turns(sample: Sample) -> list[str]:
    return [turn["text"] for turn in sample.row["conversations"]]


def parse(caption: str) -> tuple[dict[str, dict[str, str]], str]:
    """Objects by cell, and the background, from the words of a long caption alone."""
    *clauses, last = caption.split("; ")
    found = {}
    for clause in clauses:
        match = re.fullmatch(r"(.+): an? (\w+) (\w+) (\w+)", clause)
        assert match, caption
        found[match[1]] = {"cell": match[1], "size": match[2], "colour": match[3], "shape": match[4]}
    return found, last.removeprefix("background: ")


def select(objects: dict[str, dict[str, str]], words: str) -> list[dict[str, str]]:
    if place := re.fullmatch(r"objects? at the (.+)", words):
        return [objects[place[1]]] if place[1] in objects else []
    wanted = {word.removesuffix("s") for word in words.split()} - {"object"}
    return [item for item in objects.values() if wanted <= set(item.values())]


def answer(caption: str, question: str) -> str:
    objects, background = parse(caption)
    if question == "What is the background?":
        return background
    if match := re.fullmatch(r"What (colour|shape|size) is the (.+)\?", question):
        return select(objects, match[2])[0][match[1]]
    if match := re.fullmatch(r"Where is the (.+)\?", question):
        return select(objects, match[1])[0]["cell"]
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        return NUMBERS[len(select(objects, match[1]))]
    match = re.fullmatch(r"Is there an? (.+)\?", question)
    assert match, question
    return "yes" if select(objects, match[1]) else "no"


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
        objects = {
            item.cell: {name: getattr(item, name) for name in ("cell", "size", "colour", "shape")} for item in sample.target.objects
        }
        (first,), (second,) = (select(objects, match[i]) for i in (1, 3))
        (row, column), (row2, column2) = (divmod(world.places.index(item["cell"]), world.cells) for item in (first, second))
        true = {"left of": column < column2, "right of": column > column2, "above": row < row2, "below": row > row2}
        assert first is not second and true[match[2]]


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


def changed(objects: dict[str, dict[str, str]], background: str, instruction: str) -> tuple[dict[str, Any], str]:
    """An instruction carried out on the words of a caption; an oracle of its own."""
    objects = {cell: dict(item) for cell, item in objects.items()}
    if match := re.fullmatch(r"Make the background (\w+)\.", instruction):
        return objects, match[1]
    if match := re.fullmatch(r"Add an? (\w+) (\w+) (\w+) at the (.+)\.", instruction):
        objects[match[4]] = {"cell": match[4], "size": match[1], "colour": match[2], "shape": match[3]}
        return objects, background
    if match := re.fullmatch(r"Move the (.+) to the ([a-z ]+)\.", instruction):
        (item,) = select(objects, match[1])
        del objects[item["cell"]]
        objects[match[2]] = {**item, "cell": match[2]}
        return objects, background
    if match := re.fullmatch(r"Remove the (.+)\.", instruction):
        (item,) = select(objects, match[1])
        del objects[item["cell"]]
    elif match := re.fullmatch(r"Turn the (.+) into an? (\w+)\.", instruction):
        (item,) = select(objects, match[1])
        item["shape"] = match[2]
    else:
        match = re.fullmatch(r"Make the (.+) (\w+)\.", instruction)
        assert match, instruction
        (item,) = select(objects, match[1])
        item["colour"] = match[2]
    return objects, background


@pytest.mark.parametrize("world", WORLDS)
def test_the_answer_to_a_written_change_is_the_changed_caption(world: World) -> None:
    kinds = set()
    for sample in made(world, "readings", 180):
        if sample.row["kind"] == "read_edit":
            first, said = turns(sample)
            caption, instruction = first.split("\n")
            assert parse(said) == changed(*parse(caption), instruction)
            kinds.add(instruction.split()[0])
    assert kinds == {"Make", "Add", "Move", "Remove", "Turn"}


def described(scene: Scene) -> tuple[dict[str, dict[str, str]], str]:
    items = {o.cell: {"cell": o.cell, "size": o.size, "colour": o.colour, "shape": o.shape} for o in scene.objects}
    return items, scene.background


def composed(first: tuple[dict[str, Any], str], second: tuple[dict[str, Any], str], instruction: str) -> tuple[dict[str, Any], str]:
    """An object of the second image in the first, from the words of the instruction."""
    objects, background = dict(first[0]), first[1]
    if match := re.fullmatch(r"Put the (.+) of the second image into the first image at the (.+)\.", instruction):
        guest, cell = match[1], match[2]
    else:
        match = re.fullmatch(r"Replace the (.+) in the first image with the (.+) of the second image\.", instruction)
        assert match, instruction
        guest, cell = match[2], select(objects, match[1])[0]["cell"]
    (item,) = select(second[0], guest)
    objects[cell] = {**item, "cell": cell}
    return objects, background


def test_an_imagined_change_describes_what_the_edit_would_draw() -> None:
    world = World()
    kinds: Counter[str] = Counter()
    for sample in made(world, "imagined", 96):
        kinds[sample.row["kind"]] += 1
        first, said = turns(sample)
        instruction = first.removeprefix("<image>\n" * len(sample.scenes))
        assert sample.target is None and first.count("<image>") == len(sample.scenes)
        objects, background = parse(said)
        if len(sample.scenes) == 1:
            assert (objects, background) == changed(*described(sample.scenes[0]), instruction)
        else:
            assert (objects, background) == composed(*(described(scene) for scene in sample.scenes), instruction)
    assert kinds == {f"imagine_{kind}": 12 for kind in (*EDITS, *COMPOSITIONS)}
