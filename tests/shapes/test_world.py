import json
from dataclasses import replace

import numpy as np
import pytest
from oracles import BIG

from umm_zoo.shapes import SPLITS, TASKS, Scene, World, make_sample, sample_scene, sample_stream
from umm_zoo.shapes.scenes import split_of


def scenes(world, split, count, seed=0):
    return [sample_scene(world, split, sample_stream(seed, split, "any", i)) for i in range(count)]


def test_a_sample_is_a_function_of_its_name_alone():
    np.random.seed(1)
    first = [make_sample(BIG, 5, "val", "questions", i) for i in (7, 3)]
    np.random.seed(2)
    second = [make_sample(World(**BIG.to_json()), 5, "val", "questions", i) for i in (3, 7)]
    assert first == second[::-1]
    assert first[0].members(BIG) == second[1].members(BIG)
    assert make_sample(BIG, 6, "val", "questions", 7) != first[0]


def test_scenes_survive_json():
    for scene in scenes(BIG, "train", 20):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_scenes_keep_to_the_world():
    world = World(cells=3, num_colours=5, num_shapes=3, max_objects=2)
    found = scenes(world, "train", 400)
    objects = [item for scene in found for item in scene.objects]
    assert {len(scene.objects) for scene in found} == {1, 2}
    assert {item.colour for item in objects} == {"red", "green", "blue", "yellow", "purple"}
    assert {item.shape for item in objects} == {"circle", "square", "triangle"}
    assert {item.cell for item in objects} == set(world.places) and len(world.places) == 9
    assert all(len({item.cell for item in scene.objects}) == len(scene.objects) for scene in found)


@pytest.mark.parametrize("colours", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("shapes", [2, 3, 4])
def test_held_out_combinations(colours, shapes):
    world = World(num_colours=colours, num_shapes=shapes)
    assert len(world.heldout) == len(world.popular) == shapes
    assert not world.heldout & world.popular
    allowed = world.combinations("train")
    assert {colour for _, colour in allowed} == set(world.colours) and {shape for shape, _ in allowed} == set(world.shapes)
    for split in ("train", "val", "test", "hybrid"):
        for scene in scenes(world, split, 30):
            assert not {item.combination for item in scene.objects} & world.heldout
    for scene in scenes(world, "heldout", 30):
        assert {item.combination for item in scene.objects} & world.heldout


@pytest.mark.parametrize("task", [task for task in TASKS if task != "hybrid_edits"])
def test_no_training_sample_speaks_of_or_shows_a_held_out_combination(task):
    world = World()
    for i in range(120):
        sample = make_sample(world, 0, "train", task, i)
        shown = [*sample.scenes, *([sample.target] if sample.target else [])]
        assert not {item.combination for scene in shown for item in scene.objects} & world.heldout
        for shape, colour in world.heldout:
            assert not any(f"{colour} {shape}" in turn["text"] for turn in sample.row["conversations"])


def test_splits_share_no_coarse_scene_under_any_seed():
    world = World(max_objects=1)  # 192 coarse scenes, so chance alone would repeat nearly all of them
    found = {
        split: {s.coarse() for seed in range(2) for s in scenes(world, split, 150, seed)} for split in ("train", "val", "test")
    }
    assert not found["train"] & found["val"] and not found["train"] & found["test"] and not found["val"] & found["test"]
    assert min(map(len, found.values())) > 5


def test_a_mark_does_not_change_the_split():
    for scene in scenes(BIG, "val", 10):
        other = replace(scene, objects=tuple(replace(item, mark="top left", jitter=(0, 0)) for item in scene.objects))
        assert split_of(other) == "val"


def test_popular_combinations_appear_twice_as_often():
    world = World(num_shapes=3, num_colours=6)
    shown = [item.combination for scene in scenes(world, "train", 3000) for item in scene.objects]
    plain = set(world.combinations("train")) - world.popular
    popular, others = (sum(item in group for item in shown) / len(group) for group in (world.popular, plain))
    assert 1.7 < popular / others < 2.3


@pytest.mark.parametrize(
    "arguments",
    [
        {"cells": 4},
        {"num_colours": 3},
        {"num_colours": 9},
        {"num_shapes": 1},
        {"max_objects": 0},
        {"image_size": 48},
        {"detail": "spot"},
        {"sizes": ("tiny",)},
    ],
)
def test_arguments_out_of_range_name_themselves(arguments):
    with pytest.raises(ValueError, match=f"World.{next(iter(arguments))}: found .*expected"):
        World(**arguments)


def test_wrong_sample_names():
    for arguments, words in (
        (("dev", "captions"), "split: found 'dev'"),
        (("val", "caption"), "task: found"),
        (("val", "hybrid_edits"), "hybrid"),
    ):
        with pytest.raises(ValueError, match=words):
            make_sample(World(), 0, *arguments, 0)


@pytest.mark.parametrize("world", [World(max_objects=1, sizes=("large",)), World(max_objects=4), BIG])
def test_every_task_exists_in_every_world(world):
    for split in SPLITS:
        for task in TASKS:
            if (task == "hybrid_edits") == (split == "hybrid"):
                for i in range(24):
                    assert make_sample(world, 1, split, task, i).row["task"] == task


def test_but_for_looks_that_are_held_out_as_many_scenes_are_seen_as_there_are_at_most():
    world = World(max_objects=1, sizes=("small",), detail="none", max_jitter=0, striped=False)
    rngs = [(split, sample_stream(0, split, "text_to_image", i)) for split in ("train", "val", "test") for i in range(600)]
    seen = {json.dumps(sample_scene(world, split, rng).to_json()) for split, rng in rngs}
    held_out = 4 * 4 * len(world.heldout)  # pairs of colour and shape that no split of ordinary tasks has
    assert world.most_scenes == 4 * 4 * 8 == len(seen) + held_out
