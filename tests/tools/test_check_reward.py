"""The reward's check: what each change of a caption is, and that drops are compared with the decoder's noise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tools import check_reward as tool
from umm_zoo.batch import Batch
from umm_zoo.outputs import Sampling
from umm_zoo.rewards import Reward

SMALL = {"cell": "top left", "size": "small", "colour": "red", "shape": "circle"}
LARGE = {"cell": "top right", "size": "large", "colour": "blue", "shape": "square"}


class Clauses:
    """Generates as bright an image as its caption has objects, and a little brighter from later seeds."""

    def generate(self, batch: Batch, seeds: Sequence[int], sampling: Sampling | None = None) -> list[Tensor]:
        texts = [conversation[0]["text"] for conversation in batch.conversations]
        levels = [0.1 * text.count(" a ") + 0.01 * (seed // 1000) for text, seed in zip(texts, seeds, strict=True)]
        return [torch.full((3, 2, 2), level) for level in levels]


class Brightness(Reward):
    """The mean."""

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        return torch.stack([image.mean() for image in candidates])


def test_changes_of_a_scene():
    assert tool.caption([SMALL], "grey") == "top left: a small red circle; background: grey"
    assert tool.CHANGES["small object left out"]([SMALL, LARGE]) == [LARGE]
    assert tool.CHANGES["large object left out"]([SMALL]) is None
    assert tool.CHANGES["small object left out"]([SMALL]) is None
    assert tool.CHANGES["small object recoloured"]([SMALL, LARGE])[0]["colour"] == "green"


def test_drops_are_means_over_the_scenes_that_have_such_an_object():
    metas = [{"scene": {"background": "grey", "objects": objects}} for objects in ([SMALL, LARGE], [LARGE])]
    found = tool.drops(Clauses(), Brightness(), Batch(["a", "b"], [[], []], meta=metas), seeds=2)
    assert found["small object left out"] == (pytest.approx(0.1, abs=1e-5), 1)
    assert found["small object recoloured"] == (pytest.approx(0.0, abs=1e-5), 1)
    assert found["large object left out"] == (pytest.approx(0.1, abs=1e-5), 1)
    assert found["noise"] == (pytest.approx(0.01 / 2**0.5, abs=1e-4), 2)
