"""Metrics of captions of the shapes world, clause by clause against the scene."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.metrics.answers import clauses
from umm_zoo.metrics.rows import RowMetric, required
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.language import clause as clause_of
from umm_zoo.shapes.language import detailed_clause
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
    """Counts of ``top left: a small red circle; ...; background: grey`` against the ``scene`` of a sample.

    A clause is right when cell, size, colour and shape all are, whatever it says of the object's fine detail. One said twice counts
    as two mentions of which one is true.
    """
    said, true = [without_detail(clause) for clause in clauses(caption)], Scene.from_json(scene)
    mentioned = [clause for clause in said if not clause.startswith("background:")]
    right = [item.size for item in true.objects if clause_of(item) in mentioned]
    small, large = ((len(true.matching(size=size)), right.count(size)) for size in SIZES)
    background = f"background: {true.background}" in said
    words = len(caption.replace(":", " ").replace(";", " ").split())
    return ClauseCounts(len(mentioned), len(right), len(true.objects), *small, *large, int(background), words)


def without_detail(clause: str) -> str:
    """``top left: a small red circle`` of ``top left: a small red circle with a plus``."""
    return clause.partition(" with ")[0]


class CaptionClauses(RowMetric):
    """Precision and recall of the clauses of captions, and how long captions are.

    ``compute`` gives ``precision`` (true clauses of all mentioned), ``recall`` (objects described rightly and completely),
    ``small`` and ``large`` (recall by size), ``faithful`` (share of captions that mention something and nothing wrong),
    ``background``, ``mentioned`` (clauses per caption) and ``words``. Rows without ``meta["scene"]`` are left out.

    Raises:
        UserError: there are no ``answers``.
    """

    reads = ("answers",)
    scores = ("precision", "recall", "small", "large", "faithful", "background", "mentioned", "words")

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        texts = required(outputs, "answers", self)
        for row in self.chosen(batch):
            if (scene := batch.meta[row].get("scene")) is not None:
                counts = clause_counts(texts[row], scene)
                faithful = counts.mentioned > 0 and counts.true == counts.mentioned
                yield [*counts, int(faithful), 1]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Rates, without those that have no denominator."""
        named = dict(zip([*ClauseCounts._fields, "faithful", "captions"], records.double().sum(dim=0), strict=True))
        rates = {"precision": ("true", "mentioned"), "recall": ("true", "objects")}
        rates |= {size: (f"{size}_true", size) for size in ("small", "large")}
        counted = {"faithful": "faithful", "background": "background_true", "mentioned": "mentioned", "words": "words"}
        rates |= {name: (over, "captions") for name, over in counted.items()}
        return {name: named[over] / named[under] for name, (over, under) in rates.items() if named[under] > 0}


class CaptionDetails(RowMetric):
    """Fine details in captions, of the objects that are described rightly: whether they are named, and whether that is right.

    ``compute`` gives ``named`` (share of those objects whose clause names a detail), ``right`` (share whose clause names the true
    one) and ``precision`` (true ones of all named). Rows without ``meta["scene"]`` are left out.

    Raises:
        UserError: there are no ``answers``.
    """

    reads = ("answers",)

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        texts = required(outputs, "answers", self)
        for row in self.chosen(batch):
            if (scene := batch.meta[row].get("scene")) is not None:
                said = {without_detail(clause): clause for clause in clauses(texts[row])}
                found = [(item, said[clause_of(item)]) for item in Scene.from_json(scene).objects if clause_of(item) in said]
                named = sum(clause != clause_of(item) for item, clause in found)
                yield [len(found), named, sum(clause == detailed_clause(item) for item, clause in found)]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Rates, without those that have no denominator."""
        described, named, right = records.double().sum(dim=0)
        rates = {"named": (named, described), "right": (right, described), "precision": (right, named)}
        return {name: over / under for name, (over, under) in rates.items() if under > 0}
