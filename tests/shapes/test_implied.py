"""Prompts with implied content: what the words mean, what a thought says of them, and what images and rewrites are worth."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from shapes_batches import batch_of, images_of
from values_over_ranks import scored

from data_pipelines.caption_tasks import Thoughts
from umm_zoo.batch import Batch, Turn, stacked
from umm_zoo.outputs import Outputs
from umm_zoo.shapes import Sample, Scene, World, make_sample
from umm_zoo.shapes.implied import TREES, fruit_table
from umm_zoo.shapes.implied_metrics import ImpliedMatch, Rewrites
from umm_zoo.shapes.rewards import SceneReward

WORLD = World()
SAMPLES = [make_sample(WORLD, 3, "test", "implied", i) for i in range(24)]


def members(sample: Sample) -> dict[str, bytes]:
    made = {name: value for name, value in sample.members(WORLD).items() if name != "__key__"}
    return {**made, "json": json.dumps(made["json"]).encode()}


def on_another_ground(scene: Scene) -> Scene:
    return replace(scene, background="grey" if scene.background != "grey" else "slate")


def test_every_tree_bears_what_is_told_of_it_and_nothing_that_is_held_out() -> None:
    table = fruit_table(WORLD)
    assert set(table) == set(TREES) and not set(table.values()) & WORLD.heldout
    assert set(table.values()) == set(WORLD.combinations("train"))
    for i in range(48):
        (_, asked), (_, answer) = (tuple(turn.values()) for turn in make_sample(WORLD, 0, "train", "facts", i).row["conversations"])
        shape, colour = table[re.search(r"tree ([A-L])", asked)[1]]
        assert answer in (shape, colour) or f"a {colour} {shape}" in answer


def test_a_prompt_with_the_table_put_in_says_what_its_image_shows() -> None:
    table = fruit_table(WORLD)
    for sample in SAMPLES:
        words = sample.row["conversations"][0]["text"]
        for tree, (shape, colour) in table.items():
            words = words.replace(f"fruit of tree {tree}", f"{colour} {shape}")
        assert words == sample.row["literal"] and bool(sample.row["trees"]) == (sample.row["kind"] == "implied")
    assert [sample.row["kind"] for sample in SAMPLES[:4]] == ["implied", "implied", "implied", "literal"]


def test_a_thought_names_the_fruit_of_every_tree_and_then_the_whole_prompt() -> None:
    made = [Thoughts()(sample.key, members(sample)) for sample in SAMPLES[:8]]
    for thought, sample in zip(made, SAMPLES, strict=False):
        answer = thought.conversation[1]["text"]
        assert answer.endswith(f" Revised Prompt:\n{sample.row['literal']}") and thought.target is None and not thought.images
        assert sorted(set(re.findall(r"tree ([A-L]) is", answer))) == sorted(set(sample.row["trees"].values()))
        assert ("There is no fruit." in answer) == (not sample.row["trees"])


def test_wrong_thoughts_are_wrong_in_both_places_and_never_in_what_was_named() -> None:
    for sample in SAMPLES[:8]:
        answer = Thoughts(wrong=1.0)(sample.key, members(sample)).conversation[1]["text"]
        told = dict(re.findall(r"tree ([A-L]) is an? (\w+ \w+)\.", answer))
        clauses = dict(clause.split(": ") for clause in answer.split("Prompt:\n")[1].split("; "))
        for item in sample.target.objects:
            right, tree = f"{item.colour} {item.shape}", sample.row["trees"].get(item.cell)
            assert right in clauses[item.cell] if tree is None else told[tree] in clauses[item.cell] and told[tree] != right


def test_true_images_show_all_and_images_of_others_do_not() -> None:
    batch = batch_of(SAMPLES)
    assert scored(ImpliedMatch(), (Outputs(generated=stacked(batch.requested)), batch)) == dict.fromkeys(ImpliedMatch.scores, 1.0)
    one = batch_of(SAMPLES[:1])  # a small red circle named, the fruit of tree G implied
    scene = SAMPLES[0].target
    implied = next(item for item in scene.objects if item.cell in SAMPLES[0].row["trees"])
    other = replace(implied, colour="blue" if implied.colour != "blue" else "red")
    wrong = replace(scene, objects=tuple(other if item is implied else item for item in scene.objects))
    values = scored(ImpliedMatch(), (Outputs(generated=images_of([wrong])), one))
    count = len(SAMPLES[0].row["trees"])
    assert values["implied"] == pytest.approx((count - 1) / count) and values["scene"] == 0 and values.get("named", 1.0) == 1


def test_rewrites_are_compared_clause_by_clause() -> None:
    batch = batch_of(SAMPLES)
    right = [f"Revised Prompt:\n{sample.row['literal']}" for sample in SAMPLES]
    assert scored(Rewrites(), (Outputs(answers=right), batch)) == dict.fromkeys(Rewrites.scores, 1.0)
    silent = [sample.row["conversations"][0]["text"] for sample in SAMPLES]
    assert scored(Rewrites(), (Outputs(answers=silent), batch)) == dict.fromkeys(Rewrites.scores, 0.0)


def test_the_reward_is_the_share_of_clauses_shown() -> None:
    sample = next(own for own in SAMPLES if len(own.target.objects) == 2)
    scene = sample.target
    fewer, other = (
        replace(scene, objects=scene.objects[:1]),
        on_another_ground(scene),
    )
    images = list(images_of([scene, fewer, other]))
    batch = batch_of([sample])
    assert SceneReward()(images, batch).tolist() == pytest.approx([1.0, 2 / 3, 2 / 4])
    first = Turn(role="user", text=f"{sample.row['literal'].split(';')[0]}; background: {scene.background}")
    said = Batch(["one"], [[first]], meta=batch.meta)
    assert SceneReward("prompt")(images, said).tolist() == pytest.approx([2 / 3, 1.0, 1 / 4])
