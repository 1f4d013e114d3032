import re
from collections import Counter

import numpy as np
import pytest
from oracles import BIG, NUMBERS, oracle, select

from umm_zoo.batch import Batch
from umm_zoo.metrics import LanguagePrior
from umm_zoo.shapes import World, make_sample, render

WORLDS = {
    "small": World(),
    "big": BIG,
    "stripes": World(detail="stripes", max_objects=4),
    "glyph": World(cells=3, detail="glyph", num_shapes=3),
}


def rows(world, task, count, split="train", seed=0, **options):
    return [make_sample(world, seed, split, task, i, **options).row for i in range(count)]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("task", ["questions", "pairs"])
def test_answers_follow_from_the_scene(world, split, task):
    for row in rows(world, task, 300, split):
        user, assistant = row["conversations"]
        marker, text = user["text"].split("\n")
        assert (marker, user["role"], assistant["role"]) == ("<image>", "user", "assistant")
        assert oracle(row["scene"], text) == assistant["text"]


def test_the_question_does_not_give_its_answer_away():
    for row in rows(BIG, "questions", 400):
        text, answer = (turn["text"] for turn in row["conversations"])
        if row["kind"] in ("colour", "shape", "size", "position"):
            assert answer not in text


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_mark_share_is_exact_in_every_hundred(share):
    kinds = Counter(row["kind"] for row in rows(World(), "questions", 200, mark_share=share))
    assert kinds["mark"] == round(200 * share)
    coarse = [kinds[kind] for kind in ("colour", "shape", "size", "count", "position")]
    assert max(coarse) - min(coarse) <= 2 and abs(kinds["exists"] - 2 * np.mean(coarse)) <= 4


def test_existence_is_balanced_in_every_setting():
    found = [row for row in rows(World(), "questions", 600) if row["kind"] == "exists"]
    table = Counter((row["negative"], row["conversations"][1]["text"]) for row in found)
    assert len(table) == 6 and len(found) == 132
    for setting in ("random", "popular", "adversarial"):
        assert table[setting, "yes"] == table[setting, "no"] == 22


def test_negatives_are_what_their_setting_says():
    for row in rows(BIG, "questions", 800):
        if row["kind"] != "exists" or row["conversations"][1]["text"] == "yes":
            continue
        colour, shape = re.search(r"an? (\w+) (\w+)\?", row["conversations"][0]["text"]).groups()
        shapes, colours = ({item[name] for item in row["scene"]["objects"]} for name in ("shape", "colour"))
        assert (shape, colour) not in BIG.heldout
        if row["negative"] == "popular":
            assert (shape, colour) in BIG.popular
        if row["negative"] == "adversarial":
            assert shape in shapes or colour in colours


def test_pairs_differ_in_one_mark_and_nothing_else():
    found = rows(BIG, "pairs", 100, "val")
    for number, (first, second) in enumerate(zip(found[::2], found[1::2], strict=True)):
        assert first["pair"] == second["pair"] == number and first["kind"] == second["kind"] == "mark_pair"
        assert first["conversations"][0] == second["conversations"][0]
        assert first["conversations"][1] != second["conversations"][1]
        pairs = zip(first["scene"]["objects"], second["scene"]["objects"], strict=True)
        differing = [(a, b) for a, b in pairs if a != b]
        assert len(differing) == 1
        a, b = differing[0]
        assert {**a, "mark": ""} == {**b, "mark": ""} and a["cell"] == first["about"]
        assert {**first["scene"], "objects": 0} == {**second["scene"], "objects": 0}


def test_images_of_a_pair_differ_in_few_pixels():
    for i in range(0, 60, 2):
        a, b = (render(BIG, make_sample(BIG, 0, "test", "pairs", i + k).scenes[0]).astype(int) for k in (0, 1))
        assert 4 <= (np.abs(a - b).sum(-1) > 0).sum() <= 18


def coarse(scene):
    return scene["background"], sorted((o["cell"], o["size"], o["colour"], o["shape"]) for o in scene["objects"])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_two_image_answers_follow_from_the_scenes(split):
    for row in rows(BIG, "two_images", 240, split):
        (first, second), answer = row["scenes"], row["conversations"][1]["text"]
        text = row["conversations"][0]["text"].removeprefix("<image>\n<image>\n")
        if row["kind"] == "two_same":
            assert answer == ("yes" if coarse(first) == coarse(second) else "no")
        elif row["kind"] == "two_which":
            words = re.fullmatch(r"Which image has an? (.+)\?", text)[1]
            has = [bool(select(scene, words)) for scene in (first, second)]
            assert has == [answer == "first", answer == "second"]
        elif row["kind"] == "two_count":
            words = re.fullmatch(r"How many (.+) are there in both images together\?", text)[1]
            assert answer == NUMBERS[len(select(first, words)) + len(select(second, words))]
        else:
            assert row["kind"] == "describe_edit" and coarse(first) != coarse(second)


def test_two_image_answers_are_balanced():
    table = Counter((row["kind"], row["conversations"][1]["text"]) for row in rows(World(), "two_images", 160))
    assert table["two_same", "yes"] == table["two_same", "no"] == 20
    assert table["two_which", "first"] == table["two_which", "second"] == 20


def test_pixels_alone_do_not_tell_the_same_scene():
    world = World()
    same = [make_sample(world, 0, "train", "two_images", i) for i in range(0, 80, 8)]
    assert {sample.row["conversations"][1]["text"] for sample in same} == {"yes"}
    assert any((render(world, a) != render(world, b)).any() for a, b in (sample.scenes for sample in same))


def test_the_wording_of_questions_leaves_something_to_see():
    samples = [make_sample(World(), 0, "train", "questions", i) for i in range(2400)]
    rows_of_set = [sample.row for sample in samples]
    metric = LanguagePrior()
    metric.update({}, Batch([sample.key for sample in samples], [row["conversations"] for row in rows_of_set], meta=rows_of_set))
    prior = metric.compute()
    assert prior["mark"] < 0.4 and prior["position"] < 0.5 and prior["exists"] < 0.65 and prior["held_out"] < 0.65


@pytest.mark.parametrize("name", ["small", "big"])
def test_every_answer_of_a_dialogue_is_right_and_no_question_comes_twice(name):
    for row in rows(WORLDS[name], "dialogues", 60):
        turns = row["conversations"]
        questions = [turn["text"].removeprefix("<image>\n") for turn in turns[::2]]
        assert 2 <= len(questions) <= 6 and len(set(questions)) == len(questions)
        assert [turn["text"] for turn in turns[1::2]] == [oracle(row["scene"], text) for text in questions]


def test_dialogues_say_yes_and_no_about_equally_often():
    answers = Counter(turn["text"] for row in rows(World(), "dialogues", 600) for turn in row["conversations"][1::2])
    assert answers["yes"] > 300 and abs(answers["yes"] / (answers["yes"] + answers["no"]) - 0.5) < 0.05


@pytest.mark.parametrize("name", ["small", "big"])
def test_every_lookup_finds_its_object_and_is_about_nothing_else(name):
    for row in rows(WORLDS[name], "lookups", 60):
        turns = row["conversations"]
        questions = [turn["text"].removeprefix("<image>\n") for turn in turns[::2]]
        assert 2 <= len(questions) == len(set(questions)) <= 12
        assert all(re.match(r"Where is the|What (colour|shape|size) is the", text) for text in questions)
        assert [turn["text"] for turn in turns[1::2]] == [oracle(row["scene"], text) for text in questions]
