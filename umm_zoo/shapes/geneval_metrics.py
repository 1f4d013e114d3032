"""Does a drawn image of the shapes world show what its prompt asks for?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.metrics.rows import NAME_WORDS, RowMetric, chosen_rows, kind_of, name_to_words, rates_by_name
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.detector import Detection, Found, ShapesDetector, true_scene
from umm_zoo.shapes.geometry import PLACES


class ShapesMetric(RowMetric):
    """What the metrics on drawn scenes share: a detector, and a rate of success per kind.

    Batches without ``generated`` are left out: a run may generate for the first batches of a validation only.

    Args:
        detector: None is for the smaller world (2 x 2 cells, 4 colours, 2 shapes).
        kinds: count these kinds only.
        tasks: count these tasks only.
    """

    reads = ("generated",)

    def __init__(
        self, detector: ShapesDetector | None = None, kinds: list[str] | None = None, tasks: list[str] | None = None
    ) -> None:
        super().__init__()
        self.detector, self.kinds, self.tasks = detector or ShapesDetector(), kinds, tasks

    def detections(self, outputs: Outputs, batch: Batch, needed: str) -> dict[int, Detection]:
        """By row, of the rows of the chosen kinds and tasks whose ground truth holds ``needed``."""
        if (images := outputs.generated) is None:
            return {}
        rows = [row for row in chosen_rows(batch, self.kinds, self.tasks) if needed in batch.meta[row]]
        return dict(zip(rows, self.detector(images[rows]), strict=True)) if rows else {}

    def rates(self, first: int = 0) -> dict[str, Tensor]:
        """Mean of column ``first`` of the records by the name in the columns that follow it; empty without rows."""
        records = self.records()
        return rates_by_name(records[:, first], records[:, first + 1 : first + 1 + NAME_WORDS]) if len(records) else {}


class ShapesGenEval(ShapesMetric):
    """GenEval in miniature (Ghosh et al., 2023, arXiv 2310.11513): share of prompts whose image shows what is asked for.

    Over rows with ``meta["requirement"]`` (the shapes world's task ``geneval``), which name a category as their kind:
    ``single_object``, ``two_objects``, ``counting``, ``colours``, ``position``, ``colour_attribution``. ``compute`` gives each
    category's rate and ``overall``, the mean over categories as in the paper. Further objects do no harm except where the number
    is asked for.

    Args:
        detector: of the world that the model draws; None is for the smaller one.
        kinds: count these categories only.
        tasks: count these tasks only.
    """

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Score ``generated``."""
        records = []
        for row, detection in self.detections(outputs, batch, "requirement").items():
            right = fulfils(detection, batch.meta[row]["requirement"], self.detector.cells)
            records.append([int(right), *name_to_words(kind_of(batch.meta[row]))])
        self.add_rows(records)

    def compute(self) -> dict[str, Tensor]:
        """``overall`` and one rate per category; nothing without rows."""
        rates = self.rates()
        return {"overall": torch.stack(list(rates.values())).mean(), **rates} if rates else {}


class SceneMatch(ShapesMetric):
    """Share of drawn images that show the very scene they should: background, and every object's place, size, colour and shape.

    Over rows with ``meta["target_scene"]``. ``compute`` gives ``scene`` (all of it right, marks aside), ``objects`` (share of true
    objects that are there, cell, shape, colour and size right), ``marks`` (share of those whose mark is right, which no prompt
    names), ``extra`` (objects drawn where there should be none, per image) and ``background``.

    Args:
        detector: of the world that the model draws; None is for the smaller one.
        kinds: count these kinds only; prompts that leave something open cannot be scored so.
        tasks: count these tasks only.
    """

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Score ``generated``."""
        records = []
        for row, seen in self.detections(outputs, batch, "target_scene").items():
            truth = true_scene(batch.meta[row]["target_scene"])
            pairs = [(found, item) for item in truth.objects if (found := seen.at(item.cell)) is not None and found.same(item)]
            marked = sum(found.mark == item.mark for found, item in pairs)
            extra = sum(truth.at(item.cell) is None for item in seen.objects)
            ground = seen.background == truth.background
            records.append([int(seen.shows(truth)), len(pairs), len(truth.objects), marked, extra, int(ground)])
        self.add_rows(records)

    def compute(self) -> dict[str, Tensor]:
        """``scene``, ``objects``, ``marks``, ``extra`` and ``background``; nothing without rows."""
        records = self.records()
        if not len(records):
            return {}
        scene, right, wanted, marked, extra, ground = records.double().mean(dim=0)
        marks = marked / right  # NaN where no object was right
        return {"scene": scene, "objects": right / wanted, "marks": marks, "extra": extra, "background": ground}


def fulfils(detection: Detection, requirement: Mapping[str, Any], cells: int) -> bool:
    """Whether an image shows what is asked for; see ``umm_zoo.shapes.geneval`` for the requirement's form."""
    matching = [_matching(detection, wanted) for wanted in requirement["include"]]
    for found, wanted in zip(matching, requirement["include"], strict=True):
        if len(found) < wanted["count"] or (wanted["exact"] and len(found) > wanted["count"]):
            return False
    relation = requirement.get("relation")
    return relation is None or any(lies(first, second, relation, cells) for first in matching[0] for second in matching[1])


def lies(first: Found, second: Found, relation: str, cells: int) -> bool:
    """Whether the first object lies ``left of``, ``right of``, ``above`` or ``below`` the second.

    Raises:
        ValueError: an unknown relation.
    """
    (row, column), (other_row, other_column) = (divmod(PLACES[cells].index(item.cell), cells) for item in (first, second))
    holds = {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }
    if relation not in holds:
        raise ValueError(f"requirement.relation: found '{relation}', expected {', '.join(holds)}")
    return holds[relation]


def _matching(detection: Detection, wanted: Mapping[str, Any]) -> list[Found]:
    colours = {wanted["colour"]} if "colour" in wanted else {item.colour for item in detection.objects}
    return [item for item in detection.objects if item.shape == wanted["shape"] and item.colour in colours]
