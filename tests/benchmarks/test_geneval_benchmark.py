"""GenEval as a benchmark: its prompts, its scores, and the shapes world's own in miniature."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shapes_batches import batch_of, images_of
from test_geneval_detectors import Told
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.benchmarks.geneval.benchmark import GenEval
from umm_zoo.benchmarks.geneval.colours import AttributeNamer, Subject
from umm_zoo.benchmarks.geneval.detector import COCO
from umm_zoo.benchmarks.geneval.metadata import SHIPPED
from umm_zoo.benchmarks.geneval.shapes import MiniGenEval, wanted_of
from umm_zoo.errors import UserError
from umm_zoo.generation.generating import TextToImage
from umm_zoo.metrics.geneval_rule import Detections
from umm_zoo.outputs import Outputs
from umm_zoo.shapes import World, make_sample
from umm_zoo.shapes.geneval_metrics import ShapesGenEval

DOG = {"class": "dog", "count": 1}


class Reddish(AttributeNamer):
    """Red where the box begins at the left edge, else blue."""

    asked = 0

    def forward(self, subjects: list[Subject]) -> list[str]:
        self.asked += 1
        return ["red" if one.found.box[0] == 0 else "blue" for one in subjects]

    def digest(self) -> str:
        return "reddish"


def found(*things: tuple[str, float, float]) -> Detections:
    boxes = np.array([[left, 0, left + 4, 4] for _, _, left in things], np.float32).reshape(-1, 4)
    return Detections([thing[0] for thing in things], np.array([thing[1] for thing in things], np.float32), boxes)


def told(**more: Any) -> GenEval:
    """Images of level 0 show nothing, of 1 a red dog, of 2 two dogs and a cat."""
    seen = {0: found(), 1: found(("dog", 0.95, 0)), 2: found(("dog", 0.6, 0), ("dog", 0.95, 8), ("cat", 0.5, 20))}
    return GenEval(detector=Told(seen), colours=Reddish(), **more)


def step(*rows: tuple[dict[str, Any], int]) -> tuple[Outputs, Batch]:
    images = [torch.full((3, 2, 2), level / 127.5 - 1) for _, level in rows]
    batch = Batch([f"row {i}" for i in range(len(rows))], [[] for _ in rows], meta=[meta for meta, _ in rows])
    return Outputs(generated=images), batch


def wanted(tag: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), **more}


def scored(metric: GenEval, *steps: tuple[Outputs, Batch]) -> dict[str, float]:
    for outputs, batch in steps:
        metric.update(outputs, batch)
    return {name: float(value) for name, value in metric.compute().items()}


def test_the_official_prompts_ship() -> None:
    items = told().items()
    assert Counter(item.meta["tag"] for item in items) == {
        "position": 100, "color_attr": 100, "two_object": 99, "colors": 94, "single_object": 80, "counting": 80}  # fmt: skip
    assert (items[0].key, items[0].text, items[-1].key) == ("00000", "a photo of a bench", "00552")
    assert isinstance(told().command(items[0]), TextToImage) and GenEval.per_item == 4
    assert (SHIPPED.parent / "geneval.NOTICE").read_text().count("Copyright (c) 2023 Dhruba Ghosh") == 1


def test_scores_by_task_image_and_prompt() -> None:
    red, two = (
        wanted("colors", {**DOG, "color": "red"}, prompt="a red dog"),
        wanted("two_object", DOG, {"class": "cat", "count": 1}),
    )
    scores = scored(told(), step((red, 0), (red, 1), (red, 1)), step((red, 2), (two, 2), ({"kind": "caption"}, 1)))
    assert scores == {"overall": 0.75, "images": pytest.approx(3 / 5), "prompts": 1, "colors": 0.5, "two_object": 1}


def test_a_verdict_says_why_and_what_was_seen() -> None:
    metric = told()
    rows = ((wanted("colors", {**DOG, "color": "red"}), 2), (wanted("counting", DOG, exclude=[{"class": "dog", "count": 2}]), 2))
    (_, colour), (_, count) = metric.verdicts(*step(*rows))
    assert (colour.score, colour.kind, colour.reason) == (0, "colors", "expected red dog>=1, found 0 red; and 1 blue")
    assert (
        json.loads(colour.columns["detected"])["dog"][0] == [8, 0, 12, 4, 0.95] and colour.columns["colours"] == '{"dog": ["blue"]}'
    )
    assert count.score == 1 and metric.colours.asked == 1  # the faint dog is not counted; no colour is asked of it


def test_rows_without_images_or_of_other_tasks_do_not_count() -> None:
    rows = step((wanted("colors", DOG), 1), (wanted("counting", DOG), 0))
    assert scored(told(kinds=["colors"]), rows) == {"overall": 1, "images": 1, "prompts": 1, "colors": 1}
    assert list(told().verdicts(Outputs(), rows[1])) == []


def test_a_row_that_no_detector_could_judge_is_named() -> None:
    with pytest.raises(UserError) as caught:
        list(told().verdicts(*step((wanted("a", DOG), 1), (wanted("a", {"class": "keyboard", "count": 1}), 1))))
    caught.value.locate(keys=["first", "second"])
    assert "second: found include 0: class 'keyboard', expected one of the detector's classes; did you mean" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "2: found no JSON"),
        ('{"tag": "a", "include": []}', "2: found no 'prompt'"),
        ('{"prompt": "x", "include": []}', "found the tag None"),
        ({}, "found neither include nor exclude"),
        ({"include": {"class": "dog"}}, "found include {'class': 'dog'}, expected a list"),
        ({"include": [{"class": "dgo", "count": 1}]}, "did you mean 'dog'"),
        ({"include": [{"class": "mouse", "count": 1}]}, "did you mean 'computer mouse'"),
        ({"include": [{"class": "dog", "count": 0}]}, "count 0, expected a whole number"),
        ({"include": [{"class": "dog", "count": True}]}, "count True"),
        ({"include": [{**DOG, "colour": "red"}]}, "'colour', expected class, color, count, position; did you mean 'color'"),
        ({"include": [{**DOG, "color": "grey"}]}, "color 'grey', expected one of red, orange"),
        ({"include": [DOG, {**DOG, "position": ["on", 0]}]}, r"position \['on', 0\]"),
        ({"include": [DOG, {**DOG, "position": ["above", 1]}]}, r"position \['above', 1\]"),
        ({"exclude": [{**DOG, "color": "red"}]}, "exclude 0: 'color'"),
    ],
)
def test_lines_that_cannot_be_judged(line: Any, message: str, tmp_path: Path) -> None:
    text = line if isinstance(line, str) else json.dumps({"tag": "a", "prompt": "x", **line})
    (tmp_path / "own.jsonl").write_text(json.dumps({"tag": "a", "prompt": "x", "include": [DOG]}) + "\n" + text + "\n")
    with pytest.raises(UserError, match=message):
        told(prompts=tmp_path / "own.jsonl").items()
    with pytest.raises(UserError, match="found no file"):
        told(prompts=tmp_path / "none.jsonl").items()


def test_what_names_colours_is_needed_where_a_prompt_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps({"tag": "a", "prompt": "x", "include": [DOG]}) + "\n")
    metric = GenEval(tmp_path / "own.jsonl", Told({1: found(("dog", 0.95, 0))}))
    assert len(metric.items()) == 1 and scored(metric, step((wanted("a", DOG), 1)))["a"] == 1 and "colours" not in metric.protocol()
    with pytest.raises(UserError, match=r"colours: .*found 'openai/clip-vit-large-patch14'"):
        GenEval(detector=Told({})).items()


def test_requirements_of_the_shapes_world_in_genevals_form() -> None:
    circle, square = ({"shape": shape, "count": 1, "exact": False} for shape in ("circle", "square"))
    assert wanted_of({"include": [circle, square], "relation": "above"}, "position") == {
        "tag": "position",
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["above", 0]}],
    }
    assert wanted_of({"include": [{**circle, "count": 2, "exact": True}]}, "counting") == {
        "tag": "counting", "include": [{"class": "circle", "count": 2}], "exclude": [{"class": "circle", "count": 3}]}  # fmt: skip
    assert wanted_of({"include": [{**circle, "colour": "red"}]}, "colours")["include"] == [
        {"class": "circle", "count": 1, "color": "red"}
    ]
    with pytest.raises(UserError, match="an exact number with a colour"):
        wanted_of({"include": [{**circle, "exact": True, "colour": "red"}]}, "colours")


def mini(change: bool) -> tuple[MiniGenEval, tuple[Outputs, Batch]]:
    benchmark = MiniGenEval(World(), num_prompts=30)
    samples = [make_sample(World(), 0, "test", "geneval", i) for i in range(30)]
    scenes: list[Any] = [sample.target for sample in samples]
    if change:  # each image shows the shapes and colours of the next, in its own places
        pool = [item for scene in scenes[1:] + scenes[:1] for item in scene.objects]
        for i, scene in enumerate(scenes):
            items = [replace(item, colour=pool[i + k].colour, shape=pool[i].shape) for k, item in enumerate(scene.objects)]
            scenes[i] = replace(scene, objects=tuple(items))
    images: list[Tensor] = list(images_of(scenes))
    return benchmark, (Outputs(generated=images), batch_of(samples))


def test_true_scenes_fulfil_the_miniature() -> None:
    benchmark, (outputs, batch) = mini(change=False)
    assert [item.key for item in benchmark.items()] == batch.keys
    assert set(scored(benchmark, (outputs, batch)).values()) == {1.0}


def test_the_miniature_agrees_with_the_worlds_own_metric_where_nothing_more_is_shown() -> None:
    benchmark, (outputs, batch) = mini(change=True)
    new, old = scored(benchmark, (outputs, batch)), ShapesGenEval()
    old.update(outputs, batch)
    expected = {name: float(value) for name, value in old.compute().items()}
    assert {name: new[name] for name in expected} == expected and 0.1 < expected["overall"] < 0.9


def test_what_the_miniature_detects_has_boxes_masks_and_colours() -> None:
    benchmark, (outputs, _) = mini(change=False)
    scene = make_sample(World(), 0, "test", "geneval", 5).target
    (seen,) = benchmark.detector([outputs.generated[5]])
    assert sorted(seen.names) == sorted(item.shape for item in scene.objects) and seen.masks.shape == (2, 32, 32)
    for mask, box in zip(seen.masks, seen.boxes, strict=True):
        rows, columns = np.argwhere(mask).T
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    subjects = [
        Subject(outputs.generated[5], name, one) for name, own in benchmark.rule.kept(seen, "colours").items() for one in own
    ]
    shown = {item.shape: item.colour for item in scene.objects}
    assert benchmark.colours(subjects) == [shown[one.name] for one in subjects] and len(COCO) == 80
