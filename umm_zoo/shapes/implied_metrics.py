"""Metrics of prompts with implied content: whether images and rewritten prompts show what the trees of a prompt bear."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.metrics.answers import clauses
from umm_zoo.metrics.rows import RowMetric, required
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.geneval_metrics import ShapesMetric
from umm_zoo.shapes.language import clause
from umm_zoo.shapes.scenes import Object, Scene


class ImpliedMatch(ShapesMetric):
    """Share of objects whose colour and shape an image shows in their place: of those that a prompt implies, and of those it names.

    Over rows with ``meta["trees"]`` and ``meta["target_scene"]`` (the shapes world's task ``implied``). ``compute`` gives
    ``implied``, ``named`` (beside implied ones), ``literal`` (in prompts that imply nothing) and ``scene`` (images that show all of
    their scene).
    """

    scores = ("implied", "named", "literal", "scene")

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        for row, seen in self.detections(outputs, batch, "trees").items():
            truth, trees = Scene.from_json(batch.meta[row]["target_scene"]), batch.meta[row]["trees"]
            right = {item.cell: _shown(seen, item) for item in truth.objects}
            implied = [right[cell] for cell in right if cell in trees]
            others = [right[cell] for cell in right if cell not in trees]
            named, literal = (others, []) if trees else ([], others)
            counts = [number for own in (implied, named, literal) for number in (sum(own), len(own))]
            yield [*counts, int(seen.coarse() == truth.coarse()), 1]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Rates, without those that have no denominator."""
        return _rates(self.scores, records)


class Rewrites(RowMetric):
    """Share of clauses that rewritten prompts have right: of what the prompt implies, and of prompts that imply nothing.

    Over rows with ``meta["trees"]`` and ``meta["literal"]``; the rewrite is what stands behind the ``marker`` in the answer.
    ``compute`` gives ``resolved`` (implied clauses that the rewrite has right), ``unchanged`` (prompts that imply nothing and are
    rewritten as they were), ``exact`` (rewrites that say all and nothing else) and ``marked`` (answers with the marker).

    Args:
        marker: before the rewrite.
        kinds, tasks: see ``RowMetric``.

    Raises:
        UserError: there are no ``answers``.
    """

    reads = ("answers",)
    scores = ("resolved", "unchanged", "exact", "marked")

    def __init__(self, marker: str = "Revised Prompt:", kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        super().__init__(kinds, tasks)
        self.marker = marker

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        answers = required(outputs, "answers", self)
        for row in self.chosen(batch):
            meta = batch.meta[row]
            if "trees" not in meta or "literal" not in meta:
                continue
            _, marker, rewrite = answers[row].partition(self.marker)
            said, true = clauses(rewrite), clauses(meta["literal"])
            items = Scene.from_json(meta["target_scene"]).objects
            implied = [clause(item) in said for item in items if item.cell in meta["trees"]]
            same = sorted(said) == sorted(true)
            plain = not meta["trees"]
            yield [sum(implied), len(implied), int(plain and same), int(plain), int(same), 1, int(bool(marker)), 1]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Rates, without those that have no denominator."""
        return _rates(self.scores, records)


def _shown(seen: Scene, item: Object) -> bool:
    found = seen.at(item.cell)
    return found is not None and found.combination == item.combination


def _rates(names: tuple[str, ...], records: Tensor) -> dict[str, Tensor]:
    """Of columns in pairs: how many, and of how many."""
    sums = records.double().sum(dim=0).view(-1, 2)
    return {name: right / of for name, (right, of) in zip(names, sums, strict=True) if of > 0}
