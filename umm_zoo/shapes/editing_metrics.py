"""Metrics of edited scenes: whether the instruction was carried out, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.metrics.images import decibels
from umm_zoo.metrics.rows import NAME_WORDS, RowMetric, name_to_words, rates_by_name, required, rows_by_size, same_sizes
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.geneval_metrics import ShapesMetric
from umm_zoo.shapes.rendering import cell_boxes
from umm_zoo.shapes.scenes import Scene


class EditSuccess(ShapesMetric):
    """Share of edits whose edited cells, and background where it was edited, show what they should (marks aside), by kind.

    Over rows with ``meta["edit"]``. Edits of two kinds at once (``recolour+move``) are counted together as ``hybrid``, every
    other by its kind. ``compute`` gives one rate per kind, ``overall`` (the mean over rows) and ``untouched``, the share
    of edits after which everything else is still there as well.
    """

    scores = ("overall", "untouched", "*")

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        for row, seen in self.detections(outputs, batch, "edit").items():
            meta = batch.meta[row]
            truth = Scene.from_json(meta["target_scene"])
            found, wanted = ([item and item.coarse() for item in map(scene.at, meta["edited_cells"])] for scene in (seen, truth))
            done = found == wanted and ("background" not in meta["edit"].split("+") or seen.background == truth.background)
            yield [int(done), *name_to_words(edit_kind(meta)), int(seen.coarse() == truth.coarse())]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """One rate per kind, ``overall`` and ``untouched``."""
        hits, untouched = records[:, 0], records[:, -1]
        return {"overall": hits.double().mean(), "untouched": untouched.double().mean(), **rates_by_name(hits, records[:, 1:-1])}


class EditPixels(RowMetric):
    """Metric of the pixels of edits: what must change and what must not.

    Over rows with ``meta["edited_cells"]``, M being those cells (the whole image where the background changes too):

    - ``copy_index``: mean of ``|y - target|^2 / (|y - target|^2 + |y - source|^2)`` over M; 0 is a perfect edit, 1 a copy of the
      source. The source is the row's first image.
    - ``preservation``: PSNR in decibels against the target outside M, averaged over rows that have an outside.
    - ``copy_index/KIND``, ``preservation/KIND``: the same by kind.

    Args:
        cells: of the board, per side.
        kinds, tasks: see ``RowMetric``.

    Raises:
        UserError: the batch has no targets or images of the generated ones' size.
    """

    reads = ("generated",)
    scores = ("copy_index", "preservation", "*")

    def __init__(self, cells: int = 2, kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        super().__init__(kinds, tasks)
        self.cells = cells

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        if (images := outputs.generated) is None:
            return
        for row in self.chosen(batch):
            meta = batch.meta[row]
            if "edited_cells" not in meta:
                continue
            source, target = _sides(batch, row, images)
            made = images[row].double().clamp(-1, 1)
            inside = edited_mask(meta, self.cells, made.shape[-1]).to(made.device)
            to_target, to_source = ((made - other).square().mean(dim=0) for other in (target, source))
            near, far = to_target[inside].sum(), to_source[inside].sum()
            index = near / (near + far).clamp(min=1e-12)
            outside = to_target[~inside]
            kept = decibels(outside.mean()) if len(outside) else near.new_tensor(torch.nan)
            values = torch.stack([index, kept]).cpu()
            yield [*name_to_words(edit_kind(meta)), *values.view(torch.int64).tolist()]  # bits: records are whole numbers

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """``copy_index`` and ``preservation``, in all and by kind."""
        index, kept = records[:, NAME_WORDS:].contiguous().view(torch.float64).T
        names, outside = records[:, :NAME_WORDS], ~kept.isnan()
        values = {"copy_index": index.mean(), "preservation": kept.nanmean()}
        values |= {f"copy_index/{kind}": value for kind, value in rates_by_name(index, names).items()}
        return values | {f"preservation/{kind}": value for kind, value in rates_by_name(kept[outside], names[outside]).items()}


class InstructionSensitivity(RowMetric):
    """Ratio of how far another instruction moves the image to how far it should: 0 where the text is ignored, 1 at best.

    ``|y1 - y2|^2 / |target1 - target2|^2``: one source, two instructions, one noise. The method chooses the second instruction and
    generates its image (a ``Bridge`` takes "change nothing", whose target is the source): it makes ``unchanged`` and
    ``unchanged_references``. Batches without ``unchanged`` are left out. ``compute`` gives the ratio of sums over all rows.

    Raises:
        UserError: one of the images is missing.
    """

    reads = ("generated", "unchanged")
    record_dtype = torch.float64

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Compare two generated images with two targets."""
        if outputs.unchanged is None:
            return
        images = {name: required(outputs, name, self) for name in ("generated", "unchanged", "unchanged_references")}
        if not all(batch.has_target):
            raise UserError("metrics.InstructionSensitivity", "no targets", "rows with KEY.target.png")
        same_sizes(self, batch, **images, target=batch.requested)
        rows = self.chosen(batch)
        self.add_rows(rows_by_size(_moves, *([own[row] for row in rows] for own in (*images.values(), batch.requested))))

    def compute(self) -> Tensor:
        """The ratio; NaN without rows."""
        records = self.records()
        if not len(records):
            return torch.tensor(torch.nan)
        moved, should = records.sum(dim=0)
        return moved / should


def _moves(made: Tensor, other: Tensor, wanted: Tensor, target: Tensor) -> Tensor:
    """How far the instruction moves each image and how far it should, ``[B, 2]``: sums of squares."""
    made, other, wanted = (images.double().clamp(-1, 1) for images in (made, other, wanted))
    return torch.stack(
        [(one - two).square().flatten(1).sum(dim=1) for one, two in ((made, other), (target.double(), wanted))], dim=1
    )


def edit_kind(meta: Mapping[str, Any]) -> str:
    """The kind of an edit: ``hybrid`` where it is two at once."""
    kind = str(meta.get("edit") or meta.get("kind") or "edit")
    return "hybrid" if "+" in kind else kind


def edited_mask(meta: Mapping[str, Any], cells: int, image_size: int) -> Tensor:
    """``[H, W]`` bool, True where an edit may change the image: its cells, or everything where the background changes."""
    everywhere = "background" in str(meta.get("edit", "")).split("+") or not meta["edited_cells"]
    mask = torch.full((image_size, image_size), everywhere, dtype=torch.bool)
    boxes = cell_boxes(cells, image_size)
    for cell in meta["edited_cells"]:
        mask[boxes[cell]] = True
    return mask


def _sides(batch: Batch, row: int, generated: list[Tensor]) -> tuple[Tensor, Tensor]:
    images, wanted = batch.images_of(row), batch.target_of(row)
    if wanted is None or not images:
        raise UserError("metrics.EditPixels", f"{batch.keys[row]} without source or target", "rows of editing tasks")
    source, target = images[0].double(), wanted.double()
    if not source.shape == target.shape == generated[row].shape or source.shape[-2] != source.shape[-1]:
        shapes = [list(image.shape) for image in (source, target, generated[row])]
        found = "source {}, target {} and image {}".format(*shapes)
        raise UserError("metrics.EditPixels", f"{batch.keys[row]}: {found}", "one shape, and a square")
    return source, target
