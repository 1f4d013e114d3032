"""Metric of captions of the shapes world, clause by clause against the scene."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from umm_zoo.batch import Batch
from umm_zoo.metrics.answers import clauses
from umm_zoo.metrics.rows import chosen_rows, required
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.language import clause as clause_of
from umm_zoo.shapes.scenes import SIZES, Scene


class ClauseCounts(NamedTuple):
    """Counts of one caption; ``mentioned``, ``true`` and ``objects`` are about objects, the background stands apart."""

    mentioned: int
    true: int
    objects: int
    small: int
    small_true: int
    large: int
    large_true: int
    background_true: int
    words: int


def clause_counts(caption: str, scene: Mapping[str, Any]) -> ClauseCounts:
    """Counts of ``top left: a small red circle; ...; background: grey`` against a scene.

    A clause is right when cell, size, colour and shape all are. One said twice counts as two mentions of which one is true.

    Args:
        caption: clauses, separated by semicolons.
        scene: as in the ``scene`` of a sample: ``background`` and ``objects`` with ``cell``, ``size``, ``colour``, ``shape``.
    """
    said, true = clauses(caption), Scene.from_json(scene)
    mentioned = [clause for clause in said if not clause.startswith("background:")]
    right = [item.size for item in true.objects if clause_of(item) in mentioned]
    small, large = ((len(true.matching(size=size)), right.count(size)) for size in SIZES)
    background = f"background: {true.background}" in said
    words = len(caption.replace(":", " ").replace(";", " ").split())
    return ClauseCounts(len(mentioned), len(right), len(true.objects), *small, *large, int(background), words)


class CaptionClauses(Metric):
    """Precision and recall of the clauses of captions, and how long captions are.

    ``compute`` gives ``precision`` (true clauses of all mentioned), ``recall`` (objects described rightly and completely),
    ``small`` and ``large`` (recall by size), ``faithful`` (share of captions that mention something and nothing wrong),
    ``background``, ``mentioned`` (clauses per caption) and ``words``. Rows without ``meta["scene"]`` are left out.

    Args:
        kinds, tasks: count these rows only.

    Raises:
        UserError: there are no ``answers``.
    """

    reads = ("answers",)
    full_state_update = False
    higher_is_better = True
    sums: Tensor

    def __init__(self, kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        super().__init__()
        self.kinds, self.tasks = kinds, tasks
        self.add_state("sums", torch.zeros(len(ClauseCounts._fields) + 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Compare each row's text with its scene."""
        texts = required(outputs, "answers", self)
        for row in chosen_rows(batch, self.kinds, self.tasks):
            if (scene := batch.meta[row].get("scene")) is not None:
                counts = clause_counts(texts[row], scene)
                faithful = counts.mentioned > 0 and counts.true == counts.mentioned
                self.sums += torch.tensor([*counts, int(faithful), 1], dtype=torch.float64, device=self.sums.device)

    def compute(self) -> dict[str, Tensor]:
        """Rates; empty when nothing was seen, and without those that have no denominator."""
        named = dict(zip([*ClauseCounts._fields, "faithful", "captions"], self.sums, strict=True))
        rates = {
            "precision": ("true", "mentioned"),
            "recall": ("true", "objects"),
            "small": ("small_true", "small"),
            "large": ("large_true", "large"),
            "faithful": ("faithful", "captions"),
            "background": ("background_true", "captions"),
            "mentioned": ("mentioned", "captions"),
            "words": ("words", "captions"),
        }
        return {name: named[over] / named[under] for name, (over, under) in rates.items() if named[under] > 0}
