"""Metrics of generated scenes: whether an image shows what its prompt asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.metrics.geneval_rule import RELATIONS, Found, GenEvalRule
from umm_zoo.metrics.rows import RowMetric, kind_of, name_to_words, rates_by_name
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.detector import ShapesDetector
from umm_zoo.shapes.scenes import PLACES, Object, Scene

#: Any offset is a direction.
BY_CELLS = GenEvalRule(margin=0.0, direction=0.0)


class ShapesMetric(RowMetric):
    """Metric of generated scenes, which a detector reads off the images.

    Batches without such images are left out: a run may generate for the first batches of a validation only.

    Args:
        detector: None is for the smaller world (2 x 2 cells, 4 colours, 2 shapes).
        kinds, tasks: see ``RowMetric``.
        images: which images are looked at.
    """

    def __init__(
        self,
        detector: ShapesDetector | None = None,
        kinds: list[str] | None = None,
        tasks: list[str] | None = None,
        images: Literal["generated", "from_true_captions"] = "generated",
    ) -> None:
        super().__init__(kinds, tasks)
        self.detector = detector or ShapesDetector()
        self.images, self.reads = images, (images,)

    def detections(self, outputs: Outputs, batch: Batch, needed: str) -> dict[int, Scene]:
        """Scenes seen by row, of the rows of the chosen kinds and tasks whose ground truth holds ``needed``."""
        if (images := getattr(outputs, self.images)) is None:
            return {}
        rows = [row for row in self.chosen(batch) if needed in batch.meta[row]]
        return dict(zip(rows, self.detector([images[row] for row in rows]), strict=True)) if rows else {}


class ShapesGenEval(ShapesMetric):
    """GenEval in miniature (Ghosh et al., 2023, arXiv 2310.11513): share of prompts whose image fulfils them.

    Over rows with ``meta["requirement"]`` (the shapes world's task ``geneval``), which name a category as their kind:
    ``single_object``, ``two_objects``, ``counting``, ``colours``, ``position``, ``colour_attribution``. ``compute`` gives each
    category's rate and ``overall``, the mean over categories as in the paper. Further objects do no harm except where the number
    is named.
    """

    scores = ("overall", "*")

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        for row, seen in self.detections(outputs, batch, "requirement").items():
            right = fulfils(seen, batch.meta[row]["requirement"], self.detector.cells)
            yield [int(right), *name_to_words(kind_of(batch.meta[row]))]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """``overall`` and one rate per category."""
        rates = rates_by_name(records[:, 0], records[:, 1:])
        return {"overall": torch.stack(list(rates.values())).mean(), **rates}


class SceneMatch(ShapesMetric):
    """Share of generated images that show the very scene they should: background, and every object's place, size, colour and shape.

    Over rows with ``meta["target_scene"]``. ``compute`` gives ``scene`` (all of it right, marks aside), ``objects`` (share of true
    objects that are there, cell, shape, colour and size right), ``extra`` (objects where there should be none, per image),
    ``background``, and where objects have marks, ``marks`` (share of the right objects whose mark is right, which no prompt names).
    Prompts that leave something open cannot be scored so: leave their kinds out.
    """

    scores = ("scene", "objects", "marks", "extra", "background")

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        for row, seen in self.detections(outputs, batch, "target_scene").items():
            truth = Scene.from_json(batch.meta[row]["target_scene"])
            pairs = [(found, item) for item in truth.objects if (found := seen.at(item.cell)) and found.coarse() == item.coarse()]
            marked, marks = sum(found.mark == item.mark for found, item in pairs), sum(bool(item.mark) for item in truth.objects)
            extra = sum(truth.at(item.cell) is None for item in seen.objects)
            ground = seen.background == truth.background
            yield [int(seen.coarse() == truth.coarse()), len(pairs), len(truth.objects), marked, marks, extra, int(ground)]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """``scene``, ``objects``, ``marks``, ``extra`` and ``background``."""
        scene, right, wanted, marked, marks, extra, ground = records.double().mean(dim=0)
        found = {"scene": scene, "objects": right / wanted, "extra": extra, "background": ground}
        return found | ({"marks": marked / right} if marks else {})  # NaN where no object was right


def fulfils(seen: Scene, requirement: Mapping[str, Any], cells: int) -> bool:
    """Whether an image fulfils a requirement; see ``umm_zoo.shapes.geneval`` for the requirement's form.

    GenEval's rule with more leave: every object that is as wanted may be the one that is meant, a relation holds where any two of
    them have it, and it goes by the rows and columns of their cells alone. ``umm_zoo.benchmarks`` has the official rule.

    Raises:
        UserError: an unknown relation.
    """
    included, relation = requirement["include"], requirement.get("relation")
    kept: dict[str, list[Found]] = {}
    include, exclude = [], []
    for place, wanted in enumerate(included):
        matching = seen.matching(**{name: wanted[name] for name in ("shape", "colour") if name in wanted})
        kept[str(place)] = [Found(_cell(item, cells), 1.0) for item in matching]
        include.append({"class": str(place), "count": wanted["count"]})
        exclude += [{"class": str(place), "count": wanted["count"] + 1}] if wanted["exact"] else []
    if not BY_CELLS.judge(kept, {"include": include, "exclude": exclude}).right:
        return False
    if relation not in (None, *RELATIONS):
        raise UserError("requirement.relation", f"'{relation}'", ", ".join(RELATIONS))
    pairs = itertools.product(kept["0"], kept[str(len(included) - 1)])
    return relation is None or any(relation in BY_CELLS.relations(first.box, second.box) for first, second in pairs)


def _cell(item: Object, cells: int) -> np.ndarray:
    """The cell of an object as a box whose sides are 1."""
    row, column = divmod(PLACES[cells].index(item.cell), cells)
    return np.array([column, row, column + 1, row + 1])
