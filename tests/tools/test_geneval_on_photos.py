"""Prompts made from annotated boxes, and what a detector got wrong about them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.geneval_on_photos import Thing, annotated, dealt, errors_of, holds, prompts_of
from umm_zoo.errors import UserError
from umm_zoo.metrics.geneval_rule import Detections


def thing(name: str, left: float, share: float = 0.05, crowd: bool = False) -> Thing:
    return Thing(name, np.array([left, 0, left + 10, 10], np.float32), share, crowd)


THINGS = [thing("dog", 0), thing("dog", 20), thing("cat", 50), thing("knife", 90, share=0.001), thing("sheep", 0, crowd=True)]


def test_prompts_are_of_what_is_large_enough_and_single() -> None:
    rows = prompts_of([*THINGS, thing("bench", 100)], 0.01, random.Random(0))
    texts = {row["prompt"] for row in rows}
    assert {row["tag"] for row in rows} == {"single_object", "two_object", "counting", "position"}
    assert "a photo of two dogs" in texts and not any("knife" in text or "sheep" in text for text in texts)
    placed = [row for row in rows if row["tag"] == "position"]
    assert {row["prompt"] for row in placed} == {"a photo of a bench right of a cat", "a photo of a cat left of a bench"}
    assert all(holds([*THINGS, thing("bench", 100)], row) for row in rows) and not any(holds([], row) for row in rows)


def test_errors_by_class() -> None:
    boxes = np.array([[0, 0, 10, 9], [70, 0, 80, 10], [1, 0, 11, 10], [50, 0, 60, 10]], np.float32)
    seen = Detections(["dog", "dog", "sheep", "cat"], np.array([0.9, 0.5, 0.4, 0.2]), boxes)
    assert errors_of([THINGS], [seen], 0.01) == {
        "dog": {"true": 2, "missed": 1, "false": 1}, "cat": {"true": 1, "missed": 1, "false": 0},
        "sheep": {"true": 0, "missed": 0, "false": 0}}  # fmt: skip


def test_each_prompt_goes_to_another_photograph_of_its_kind() -> None:
    paths, rows = [Path(str(number)) for number in range(5)], [{"tag": tag} for tag in "aabba"]
    assert [int(path.name) for path in dealt(paths, rows)] == [1, 4, 3, 2, 0]


def test_annotations_in_the_usual_folder(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match="found no annotated photographs"):
        annotated(tmp_path)
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "val2017" / "1.png")
    images = [{"id": 1, "file_name": "1.png", "width": 40, "height": 20}, {"id": 2, "file_name": "2.png", "width": 1, "height": 1}]
    boxes = [{"image_id": number, "category_id": 7, "bbox": [4, 2, 10, 8], "iscrowd": 0} for number in (1, 2)]
    stored = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "remote"}]}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(stored))
    ((path, (one,)),) = annotated(tmp_path).items()
    assert (path.name, one.name, one.box.tolist(), one.share) == ("1.png", "tv remote", [4, 2, 14, 10], 0.1)
