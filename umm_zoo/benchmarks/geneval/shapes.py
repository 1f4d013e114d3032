"""GenEval in miniature: the same benchmark over the shapes world, with its exact detector and its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umm_zoo.benchmarks.base import Item
from umm_zoo.benchmarks.geneval.benchmark import GenEval
from umm_zoo.benchmarks.geneval.colours import AttributeNamer, Subject
from umm_zoo.benchmarks.geneval.detector import Detector
from umm_zoo.errors import Count, Natural, UserError
from umm_zoo.metrics.geneval_rule import Detections, GenEvalRule
from umm_zoo.shapes.detector import ShapesDetector
from umm_zoo.shapes.rendering import cell_boxes, coverage
from umm_zoo.shapes.samples import make_sample
from umm_zoo.shapes.scenes import COLOURS, SHAPES, Object, World


class ShapesObjects(Detector):
    """The shapes of an image, with boxes and masks of their templates in the middle of their cells; every score is 1.

    Args:
        shapes: the exact detector; None is for the smaller world.
    """

    names = SHAPES

    def __init__(self, shapes: ShapesDetector | None = None, batch_size: Count = 256) -> None:
        super().__init__(batch_size)
        self.shapes = shapes or ShapesDetector()

    def detect(self, images: Tensor, least: float = 0.0) -> list[Detections]:
        """Objects in reading order."""
        side = images.shape[-1]
        found = []
        for scene in self.shapes(images.float() / 127.5 - 1):
            masks = [_mask(self.shapes.cells, side, item) for item in scene.objects]
            boxes = np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4)
            stacked = np.stack(masks) if masks else np.zeros((0, side, side), bool)
            found.append(Detections([item.shape for item in scene.objects], np.ones(len(masks), np.float32), boxes, stacked))
        return found

    def digest(self) -> str:
        """The world."""
        return f"shapes world, {self.shapes.cells} x {self.shapes.cells} cells"


class ShapesColours(AttributeNamer):
    """The colours of shapes: those of the exact detector, at the middle of each box.

    Args:
        shapes: the exact detector; None is for the smaller world.
    """

    def __init__(self, shapes: ShapesDetector | None = None) -> None:
        super().__init__()
        self.shapes = shapes or ShapesDetector()
        self.colours = tuple(COLOURS)[: self.shapes.num_colours]

    @torch.no_grad()
    def forward(self, subjects: Sequence[Subject]) -> list[str]:
        """The colour of the object whose cell the middle of the box lies in."""
        images = {id(subject.image): subject.image for subject in subjects}
        scenes = dict(zip(images, self.shapes(list(images.values())), strict=True))
        named = []
        for subject in subjects:
            x, y = ((subject.found.box[:2] + subject.found.box[2:4]) / 2).tolist()
            boxes = cell_boxes(self.shapes.cells, subject.image.shape[-1])
            cell = next(name for name, (rows, columns) in boxes.items() if y < rows.stop and x < columns.stop)
            item = scenes[id(subject.image)].at(cell)
            named.append("none" if item is None else item.colour)
        return named

    def digest(self) -> str:
        """The world."""
        return f"shapes world, {self.shapes.num_colours} colours"


class MiniGenEval(GenEval):
    """GenEval over the shapes world: its prompts, its exact detector, and the official rule.

    It differs from ``ShapesGenEval``, which has a rule of the world's own, in two cases. Where an image shows more objects of a
    class than its prompt asks for, the official rule looks at the surest alone, and of equally sure ones at the last in reading
    order, where any will do for the other. And on a board of 3 x 3 cells it does not see the shorter of two offsets, one cell
    beside two.
    On 2 x 2 cells, images that show as many objects as their prompts name are judged alike.

    Args:
        world: of the prompts; None is the smaller one.
        world_seed, split: of the prompts.
        num_prompts: how many, category after category.
        kinds: count rows of these categories only.
    """

    name = "mini-geneval"
    per_item = 1

    def __init__(
        self,
        world: World | None = None,
        world_seed: Natural = 0,
        split: str = "test",
        num_prompts: Count = 162,
        kinds: list[str] | None = None,
    ) -> None:
        self.world = world or World()
        look = self.world.cells, self.world.num_colours, self.world.num_shapes, self.world.detail, self.world.max_jitter
        shapes = ShapesDetector(*look)
        super().__init__(None, ShapesObjects(shapes), ShapesColours(shapes), GenEvalRule(), kinds)
        self.world_seed, self.split, self.num_prompts = world_seed, split, num_prompts

    def items(self) -> list[Item]:
        """Prompts of the shapes world's task ``geneval``."""
        samples = [make_sample(self.world, self.world_seed, self.split, "geneval", index) for index in range(self.num_prompts)]
        return [Item(sample.key, sample.row["conversations"][0]["text"], meta=sample.row) for sample in samples]

    def protocol(self) -> dict[str, Any]:
        """As GenEval's, with the world that the detector knows."""
        return {**super().protocol(), "world": self.world.to_json()}

    def wanted(self, meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The row's requirement in GenEval's form."""
        return wanted_of(meta["requirement"], meta["kind"]) if "requirement" in meta else None


def wanted_of(requirement: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A requirement of ``umm_zoo.shapes.geneval`` as a row of GenEval: the second named object first, beside which the first lies.

    Raises:
        UserError: a number of objects of one colour and no more, which GenEval cannot ask for.
    """
    included = requirement["include"]
    if any(clause["exact"] and "colour" in clause for clause in included):
        raise UserError("requirement", "an exact number with a colour", "one of the two: GenEval excludes by class alone")
    clauses = [_clause(clause) for clause in included]
    if "relation" in requirement:
        clauses = [clauses[-1], {**clauses[0], "position": [requirement["relation"], 0]}]
    excluded = [{"class": clause["shape"], "count": clause["count"] + 1} for clause in included if clause["exact"]]
    return {"tag": kind, "include": clauses, **({"exclude": excluded} if excluded else {})}


def _clause(clause: Mapping[str, Any]) -> dict[str, Any]:
    colour = {"color": clause["colour"]} if "colour" in clause else {}
    return {"class": clause["shape"], "count": clause["count"], **colour}


@cache
def _shape(cells: int, side: int, cell: str, shape: str, size: str) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    rows, columns = cell_boxes(cells, side)[cell]
    box = rows.stop - rows.start, columns.stop - columns.start
    mask[rows, columns] = coverage(box, cells, side, "none", shape, size, "", (0, 0))[0][..., 0] >= 0.5
    return mask


def _mask(cells: int, side: int, item: Object) -> np.ndarray:
    """``[H, W]`` bool: the pixels of which an object covers half or more."""
    return _shape(cells, side, item.cell, item.shape, item.size)


def _box(mask: np.ndarray) -> list[int]:
    """The box around a mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
