import re
from dataclasses import replace

import numpy as np
import pytest
from oracles import BIG, carry_out

from umm_zoo.shapes import World, make_sample, render
from umm_zoo.shapes.rendering import cell_boxes

WORLDS = {
    "small": World(),
    "big": BIG,
    "large": World(cells=3, num_colours=5, num_shapes=3, image_size=64, detail="glyph"),
}
CASES = [
    ("edits", "train"),
    ("edits", "heldout"),
    ("hybrid_edits", "hybrid"),
    ("compositions", "train"),
    ("compositions", "heldout"),
]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize(("task", "split"), CASES)
def test_the_target_is_what_the_instruction_says(world, task, split):
    for i in range(90):
        sample = make_sample(world, 0, split, task, i)
        text = sample.row["conversations"][0]["text"].removeprefix("<image>\n" * len(sample.scenes))
        state = (list(sample.scenes[0].objects), sample.scenes[0].background)
        for part in text.split(" and "):
            state = carry_out(world, sample.scenes, state, part)
        assert sorted(state[0], key=lambda item: world.places.index(item.cell)) == list(sample.target.objects)
        assert (state[1], sample.scenes[0].stripes) == (sample.target.background, sample.target.stripes)
        assert sample.row["target_scene"] == sample.target.to_json()


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize(("task", "split"), CASES)
def test_pixels_outside_the_edited_cells_are_identical(world, task, split):
    for i in range(60):
        sample = make_sample(world, 0, split, task, i)
        if "background" in sample.row["edit"]:
            continue
        before, after = render(world, sample.scenes[0]), render(world, sample.target)
        assert (before != after).any()
        for cell in sample.row["edited_cells"]:
            before[cell_boxes(world.cells, world.image_size)[cell]] = after[cell_boxes(world.cells, world.image_size)[cell]]
        np.testing.assert_array_equal(before, after)


def test_edit_kinds_take_turns():
    rows = [make_sample(World(), 0, "train", "edits", i).row for i in range(12)]
    assert [row["kind"] for row in rows] == 2 * ["recolour", "reshape", "move", "add", "remove", "background"]
    assert all(len(row["conversations"]) == 1 and "target_scene" in row for row in rows)


def test_hybrids_are_two_kinds_at_once_and_only_in_their_split():
    kinds = {make_sample(BIG, 0, "hybrid", "hybrid_edits", i).row["edit"] for i in range(200)}
    assert all(len(set(kind.split("+"))) == 2 for kind in kinds) and len(kinds) > 20
    assert not any("+" in make_sample(BIG, 0, "train", "edits", i).row["edit"] for i in range(60))


def test_descriptions_of_edits_tell_what_changed():
    for i in range(3, 240, 4):
        sample = make_sample(BIG, 0, "val", "two_images", i)
        assert sample.row["kind"] == "describe_edit"
        first, second = sample.scenes
        text = re.sub(r"^recolour the (.+) to (\w+)$", r"make the \1 \2", sample.row["conversations"][1]["text"])
        objects, background = carry_out(BIG, (first,), (list(first.objects), first.background), text)
        assert set(objects) == set(second.objects) and background == second.background


def test_an_inserted_object_brings_its_mark():
    for i in range(1, 40, 2):
        sample = make_sample(World(), 0, "train", "compositions", i)
        new = set(sample.target.objects) - set(sample.scenes[0].objects)
        assert len(new) == 1
        assert any(replace(new.copy().pop(), cell=item.cell) == item for item in sample.scenes[1].objects)
