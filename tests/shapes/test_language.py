import re
from dataclasses import replace

import pytest
from oracles import BIG

from umm_zoo.shapes import Object, Scene, World, make_sample
from umm_zoo.shapes.language import long_caption, refer, short_caption, with_article

WORLDS = [World(), replace(BIG, detail="glyph"), World(detail="stripes")]
SCENE = Scene(
    "slate",
    "rising",
    (
        Object("circle", "red", "small", "top left", "bottom right"),
        Object("square", "orange", "large", "top right", "top left"),
        Object("circle", "red", "large", "bottom left", "top left"),
    ),
)


def test_captions_of_one_scene_by_hand():
    assert long_caption(SCENE) == (
        "top left: a small red circle; top right: a large orange square; bottom left: a large red circle; background: slate"
    )
    assert short_caption(SCENE) == "a red circle, an orange square and a red circle"
    assert short_caption(Scene("grey", "rising", SCENE.objects[:1])) == "a red circle"
    assert with_article("orange circle") == "an orange circle"


def test_a_caption_names_the_detail_of_the_objects_that_it_is_asked_for():
    marked = (replace(item, mark=mark) for item, mark in zip(SCENE.objects, ("plus", "bar", "times"), strict=True))
    glyphs = replace(SCENE, objects=tuple(marked))
    assert long_caption(glyphs, detailed=glyphs.objects[1:]) == (
        "top left: a small red circle; top right: a large orange square with a bar; "
        "bottom left: a large red circle with a times; background: slate"
    )


def test_fixed_references_by_hand():
    assert [refer(SCENE, item) for item in SCENE.objects] == ["small red circle", "square", "large red circle"]
    assert refer(SCENE, SCENE.objects[0], avoid=("size",)) == "object at the top left"
    assert refer(SCENE, SCENE.objects[0], avoid=("size", "cell")) is None


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("order", ["canonical", "random"])
@pytest.mark.parametrize("task", ["captions", "text_to_image"])
def test_long_captions_name_the_place_first_and_everything(world, order, task):
    orders = set()
    for i in range(90):
        row = make_sample(world, 0, "train", task, i, caption_order=order).row
        if row["kind"] == "caption_short":
            continue
        scene, text = row.get("scene") or row["target_scene"], row["conversations"][-1]["text"]
        *clauses, background = text.split("; ")
        assert background == f"background: {scene['background']}"
        found = [re.fullmatch(r"([a-z ]+): an? (\w+) (\w+) (\w+)", clause).groups() for clause in clauses]
        truth = [tuple(item[name] for name in ("cell", "size", "colour", "shape")) for item in scene["objects"]]
        assert sorted(found) == sorted(truth)
        orders.add(found == truth)
    assert orders == ({True} if order == "canonical" else {True, False})


@pytest.mark.parametrize("world", WORLDS)
def test_captions_never_speak_of_the_detail(world):
    details = "mark stripe stripes glyph dot horizontal vertical rising falling plus minus times bar"
    for task in ("captions", "text_to_image"):
        for i in range(100):
            sample = make_sample(world, 0, "train", task, i)
            assert not {*details.split()} & set(re.findall(r"\w+", sample.row["conversations"][-1]["text"]))
