"""A single text, file or image where a list belongs is refused, and not taken letter by letter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.inspect import inspect
from data_pipelines.overlap import PromptIndex, find_overlaps
from tests.methods.bridge_parts import wemmu
from umm_zoo.backbones.tokenizer import TextEncoding
from umm_zoo.batch import Batch
from umm_zoo.benchmarks.judging.captions import compare_captions
from umm_zoo.benchmarks.judging.local import LocalJudge
from umm_zoo.errors import UserError
from umm_zoo.experiment.file import load_experiment
from umm_zoo.method import Method
from umm_zoo.methods.requests import request_batch
from umm_zoo.metrics import AnswerAccuracy, Means
from umm_zoo.objectives.contrast import WordSwaps
from umm_zoo.training.finished_run import load_run

IMAGE = torch.zeros(3, 8, 8)
CASES: dict[str, Callable[[], Any]] = {
    "prompts": lambda: wemmu().sample("a cat"),  # type: ignore[arg-type]
    "a file": lambda: request_batch(Path("prompts.txt")),  # type: ignore[arg-type]
    "a map": lambda: request_batch({"a cat": 1}),  # type: ignore[arg-type]
    "numbers": lambda: request_batch([1, 2]),  # type: ignore[list-item]
    "a prompt in brackets twice": lambda: request_batch([["a cat"]]),  # type: ignore[list-item]
    "one image": lambda: request_batch(["red", "green", "blue"], IMAGE),  # type: ignore[arg-type]
    "an image for a list": lambda: request_batch(["Make it red."], [IMAGE]),
    "a name of an image": lambda: request_batch(["Make it red."], ["one.png"]),  # type: ignore[list-item]
    "a path of an image": lambda: request_batch(["Make it red."], [Path("one.png")]),  # type: ignore[list-item]
    "keys": lambda: Batch("ab", [[], []]),  # type: ignore[arg-type]
    "texts": lambda: TextEncoding()("a cat", 8),  # type: ignore[arg-type]
    "kinds": lambda: AnswerAccuracy(kinds="colour"),  # type: ignore[arg-type]
    "tasks": lambda: AnswerAccuracy(tasks="caption"),  # type: ignore[arg-type]
    "names": lambda: Means("loss"),  # type: ignore[arg-type]
    "trained": lambda: wemmu().train_only("connector"),
    "overrides": lambda: load_experiment("experiments/llava/shapes.yaml", "seed=1"),
    "overrides of a run": lambda: load_run("nowhere", "seed=1"),
    "prompts of an index": lambda: PromptIndex("a cat"),
    "shards to be inspected": lambda: inspect("a.tar"),  # type: ignore[arg-type]
    "shards of overlaps": lambda: find_overlaps("a.tar", PromptIndex([])),
    "words to be swapped": lambda: WordSwaps([["red", "blue"]]).of("a red cat"),  # type: ignore[arg-type]
    "groups of words": lambda: WordSwaps(["red", "blue"]),  # type: ignore[list-item]
    "trust": lambda: load_run("nowhere", (), "toy_parts"),
    "captions": lambda: compare_captions(LocalJudge(torch.nn.Identity()), [], "a cat", []),  # type: ignore[arg-type]
    "images of captions": lambda: compare_captions(LocalJudge(torch.nn.Identity()), IMAGE, ["a"] * 3, ["b"] * 3),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CASES)
def test_one_is_not_taken_for_several(name: str) -> None:
    with pytest.raises(UserError, match=r"expected (a list of|for each prompt a list of|\[B, 3, H, W\])"):
        CASES[name]()


def test_lists_of_either_kind_pass() -> None:
    assert issubclass(type(wemmu()), Method)
    assert len(request_batch(("a", "b"), [[IMAGE], torch.stack([IMAGE] * 2)])) == 2
