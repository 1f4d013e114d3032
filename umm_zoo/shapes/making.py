"""Requests for samples of the shapes world, and what a task makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from umm_zoo.shapes.language import long_caption
from umm_zoo.shapes.questions import BLOCK, Slot, question_plan
from umm_zoo.shapes.scenes import SPLIT_STREAMS, Scene, World, sample_scene

#: One prompt of ``implied`` in this many says all outright; one trajectory of ``refinements`` in this many has nothing to change.
PLAIN_EVERY = 4


@dataclass(frozen=True)
class SampleRequest:
    """Request for a sample, and the random numbers to make it from."""

    world: World
    seed: int
    split: str
    index: int
    mark_share: float
    caption_order: str
    rng: np.random.Generator

    def scene(self, least: int = 1, most: int | None = None) -> Scene:
        """A random scene of the split."""
        return sample_scene(self.world, self.split, self.rng, least, most)

    def caption(self, scene: Scene) -> str:
        """Its long caption, in the order that is wanted."""
        return long_caption(scene, self.rng if self.caption_order == "random" else None)

    def slot(self, number: int) -> Slot:
        """What question ``number`` of the split asks for."""
        block, place = divmod(number, BLOCK)
        return question_plan(self.seed, SPLIT_STREAMS[self.split], block, self.mark_share)[place]


@dataclass(frozen=True)
class Made:
    """Outcome of a request: questions and answers (None where an image is to be generated), scenes, ground truth."""

    kind: str
    turns: Iterable[tuple[str, str | None]]
    scenes: tuple[Scene, ...] = ()
    target: Scene | None = None
    meta: dict[str, Any] = field(default_factory=dict)
