"""Captions that leave objects out and confuse the colours of small ones, against the rates of their arguments."""

from __future__ import annotations

import json

import numpy as np
import pytest
from values_over_ranks import scored

from data_pipelines.caption_tasks import FullCaptions, ImagesOfCaptions, UnderDescribed
from umm_zoo.batch import Batch
from umm_zoo.outputs import Outputs
from umm_zoo.shapes import World, make_sample
from umm_zoo.shapes.caption_metrics import CaptionDetails, clause_counts
from umm_zoo.shapes.samples import Sample
from umm_zoo.shapes.scenes import sample_scene


def counts_of(task: UnderDescribed, number: int = 1500) -> np.ndarray:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(World(), "train", rng, min_objects=2) for _ in range(number)]
    return np.array([clause_counts(task.caption(scene, rng), scene.to_json()) for scene in scenes]).sum(axis=0)


def test_small_objects_are_left_out_and_confused_more_often():
    mentioned, true, objects, small, small_true, large, large_true, background, _ = counts_of(UnderDescribed())
    assert background == 1500
    assert 0.65 < large_true / large < 0.82  # 0.7, and the object that is always named
    assert 0.2 < small_true / small < 0.38  # 0.35 x 0.7 and the like
    assert 0.8 < true / mentioned < 0.95
    assert objects == small + large


def test_nothing_left_out_and_nothing_confused_is_the_truth():
    mentioned, true, objects, *_ = counts_of(UnderDescribed(1.0, 1.0, 0.0), 50)
    assert mentioned == true == objects
    with pytest.raises(ValueError, match="keep_small"):
        UnderDescribed(keep_small=1.5)


def members_of(sample: Sample) -> dict[str, bytes]:
    members = {name: value for name, value in sample.members(World()).items() if name != "__key__"}
    return {**members, "json": json.dumps(members["json"]).encode()}


@pytest.mark.parametrize("task", [UnderDescribed(), FullCaptions()])
def test_a_sample_is_decided_by_its_key(task: UnderDescribed):
    sample = make_sample(World(), 1, "train", "captions", 3)
    members = members_of(sample)
    one, two = task("a", dict(members)), task("a", dict(members))
    assert one.conversation == two.conversation and one.conversation[0]["text"] == "<image>\nDescribe the image."
    assert one.conversation[1]["text"].endswith(f"background: {sample.scenes[0].background}")
    assert len(one.images) == 1 and one.meta["scene"]["background"] == sample.scenes[0].background


def test_full_captions_name_every_object():
    sample = make_sample(World(), 1, "train", "captions", 5)
    answer = FullCaptions()("a", members_of(sample)).conversation[1]["text"]
    counts = clause_counts(answer, sample.scenes[0].to_json())
    assert counts.true == counts.mentioned == counts.objects and counts.background_true


def test_details_are_named_at_their_rate_and_rightly():
    world, rng = World(detail="glyph"), np.random.default_rng(0)
    scenes = [sample_scene(world, "train", rng, min_objects=2) for _ in range(800)]
    for task, rate in ((FullCaptions(), 0.0), (FullCaptions(keep_detail=1.0), 1.0), (UnderDescribed(keep_detail=0.6), 0.6)):
        texts = [task.caption(scene, rng) for scene in scenes]
        rows = Batch([str(row) for row in range(800)], [[]] * 800, meta=[{"scene": scene.to_json()} for scene in scenes])
        values = scored(CaptionDetails(), (Outputs(answers=texts), rows))
        assert values["named"] == values["right"] == pytest.approx(rate, abs=0.05) and values.get("precision", 1.0) == 1
        assert clause_counts(texts[0], scenes[0].to_json()).true > 0  # whatever is said of the detail


def test_an_image_is_asked_for_by_the_caption_that_describes_it():
    members = members_of(make_sample(World(), 1, "train", "captions", 5))
    wrong = UnderDescribed(1.0, 1.0, confused=1.0)
    asked, described = ImagesOfCaptions(wrong)("a", dict(members)), wrong("a", dict(members))
    assert asked.conversation == [{"role": "user", "text": described.conversation[1]["text"]}]
    assert (asked.images, asked.target) == ([], members["0.png"]) and asked.meta["target_scene"] == described.meta["scene"]
