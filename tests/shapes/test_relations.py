import pytest
from oracles import BIG, lies

from umm_zoo.shapes import Object, World, make_sample
from umm_zoo.shapes.relations import RELATIONS, relations


def test_diagonal_neighbours_are_in_two_relations() -> None:
    first = Object("circle", "red", "small", "bottom left", "top left")
    second = Object("square", "red", "small", "top right", "top left")
    assert relations(2, first, second) == ["left of", "below"]
    assert relations(2, second, first) == ["right of", "above"]


@pytest.mark.parametrize("world", [World(), BIG])
def test_colour_relations_tell_two_colours_apart_and_hold(world: World) -> None:
    prompts = []
    for i in range(80):
        row = make_sample(world, 3, "train", "colour_relations", i).row
        prompt = row["conversations"][0]["text"]
        names, relation = next((prompt.split(f" {name} "), name) for name in RELATIONS if f" {name} " in prompt)
        items = row["target_scene"]["objects"]
        assert len(items) == 2 and len({item["colour"] for item in items}) == 2
        shown = []
        for name in names:  # "a red circle", "an orange object"
            _, colour, noun = name.split()
            (named,) = [item for item in items if item["colour"] == colour]
            assert noun in ("object", named["shape"])
            shown.append(named)
        assert lies(*shown, relation, world)
        prompts.append(prompt)
    assert {prompt.count("object") for prompt in prompts} == {0, 1, 2}


@pytest.mark.parametrize(("world", "split"), [(World(), "train"), (BIG, "train"), (World(), "heldout")])
def test_tied_relations_have_one_colour_per_shape(world: World, split: str) -> None:
    colours_of = {shape: set() for shape in world.shapes}
    for i in range(60):
        row = make_sample(world, 3, split, "tied_relations", i).row
        prompt, items = row["conversations"][0]["text"], row["target_scene"]["objects"]
        names, relation = next((prompt.split(f" {name} "), name) for name in RELATIONS if f" {name} " in prompt)
        shown = [next(item for item in items if item["shape"] == name.split()[1]) for name in names]
        assert len(items) == len({item["shape"] for item in items}) == 2 and lies(*shown, relation, world)
        assert not any(colour in prompt for colour in world.colours)
        for item in items:
            colours_of[item["shape"]].add(item["colour"])
    assert all(len(colours) == 1 for colours in colours_of.values())
    assert len(set.union(*colours_of.values())) == world.num_shapes  # no colour is of two shapes
