"""Rewards of generated scenes, which a detector reads off the images: a stand-in for a judge that is never wrong."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.metrics.answers import clauses
from umm_zoo.rewards.base import Reward, group_size
from umm_zoo.shapes.detector import ShapesDetector
from umm_zoo.shapes.language import clause, long_caption
from umm_zoo.shapes.scenes import Scene


class SceneReward(Reward):
    """Share of clauses that an image shows, of all that it shows or should show (their intersection over their union).

    A clause is ``top left: a small red circle`` or ``background: grey``; 1 is the very scene.

    Args:
        of: ``target``, the true scene of the row (``meta["target_scene"]``), whatever its prompt says; ``prompt``, the clauses that
            the prompt of the row says itself, right or wrong.
        detector: None is for the smaller world.

    Raises:
        UserError: a row has no such scene.
    """

    def __init__(self, of: Literal["target", "prompt"] = "target", detector: ShapesDetector | None = None) -> None:
        super().__init__()
        self.of, self.detector = of, detector or ShapesDetector()

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        """The shares."""
        seen, group = [set(clauses(long_caption(scene))) for scene in self.detector(candidates)], group_size(candidates, batch)
        wanted = [own for own in self._wanted(batch) for _ in range(group)]
        pairs = zip(seen, wanted, strict=True)
        return torch.tensor([len(one & other) / max(1, len(one | other)) for one, other in pairs], device=candidates[0].device)

    def _wanted(self, batch: Batch) -> list[set[str]]:
        if self.of == "prompt":
            return [set(clauses(text)) for text in batch.user_texts()]
        for row, meta in enumerate(batch.meta):
            if "target_scene" not in meta:
                raise UserError("", "no scene", "rows of the shapes world with a 'target_scene'", row=row)
        scenes = [Scene.from_json(meta["target_scene"]) for meta in batch.meta]
        return [{*(clause(item) for item in scene.objects), f"background: {scene.background}"} for scene in scenes]
