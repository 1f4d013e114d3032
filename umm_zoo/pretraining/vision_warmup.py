"""Method that trains the vision side of a language model on what is in an image, before it learns to talk about it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.batch import Batch, Grid, Images, image_of_each_row
from umm_zoo.method import Method
from umm_zoo.outputs import Outputs
from umm_zoo.pretraining.supervised_tower import (
    CellLabels,
    count_labels,
    labelled_cross_entropy,
    labels_of_scene,
    labels_of_tokens,
    scored,
    summed_over_step,
)


class _SeesImages(Protocol):
    def encode_images(self, images: Images) -> list[Tensor]: ...

    def image_grid(self, height: int, width: int) -> Grid: ...


class VisionWarmup(Method):
    """Method that names, from each image token as it enters the language model, the attributes of the object where it lies.

    A vision tower that starts from nothing together with its language model leaves the plateau of guessing only after thousands of
    steps; public models start from a pretrained tower. This gives a toy that start in a minute. A stage that comes ``after`` takes
    the model and not the heads. Our choice; no paper prescribes it.

    Args:
        vlm: a backbone with ``encode_images`` and ``image_grid``.
        labels: where the ground truth of cells comes from.
        scene_attributes: attributes of the whole scene and their values; every token names them.

    Raises:
        ValueError: an attribute of the scene has the name of an object's, or ``occupied``.
    """

    stage_only = ("heads",)

    def __init__(self, vlm: VLMBackbone, labels: CellLabels, scene_attributes: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.vlm, self.labels = vlm, labels
        self.scene_attributes = dict(scene_attributes or {})
        if taken := sorted({*labels.attributes, "occupied"} & set(self.scene_attributes)):
            raise ValueError(f"VisionWarmup.scene_attributes: found '{taken[0]}', expected names that no object's attribute has")
        named = {**labels.attributes, **self.scene_attributes}
        sizes = {**{name: len(values) for name, values in named.items()}, "occupied": 2}
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(vlm.width), nn.Linear(vlm.width, size)) for name, size in sizes.items()}
        )

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone, and ``heads``."""
        return {**self.vlm.parts(), "heads": self.heads}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of each attribute over the labelled tokens, and their sum."""
        losses, _, labels = self._losses(batch, everything=False)
        return summed_over_step(self, losses, labels)

    def units(self, batch: Batch) -> dict[str, float]:
        """Labels by attribute."""
        return {name: count_labels(labels) for name, labels in self._labels(batch, everything=False).items()}

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return ("loss", *self.heads, *(f"{name}_accuracy" for name in self.heads))

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """The losses over all labels, ``NAME_accuracy`` of each attribute, and ``counts`` of both."""
        return scored({name: name for name in self.heads}, *self._losses(batch, everything=True))

    def _losses(self, batch: Batch, everything: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Losses; and by attribute what is named and what should be, ``UNLABELLED`` where there is no label."""
        tokens = torch.cat(cast(_SeesImages, self.vlm).encode_images(image_of_each_row(batch)))  # [all N, D]
        labels = {name: wanted.to(tokens.device) for name, wanted in self._labels(batch, everything).items()}
        logits = {name: self.heads[name](tokens) for name in labels}  # [all N, values] each
        losses = {name: labelled_cross_entropy(logits[name], wanted) for name, wanted in labels.items()}
        found = {name: values.argmax(dim=-1) for name, values in logits.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}, found, labels

    def _labels(self, batch: Batch, everything: bool) -> dict[str, Tensor]:
        """By attribute what each token of the rows, one behind the other, should name, ``[all N]``."""
        grids = [cast(_SeesImages, self.vlm).image_grid(*image.shape[-2:]) for image in image_of_each_row(batch)]
        cells, side = self.labels(batch, everything), self.labels.side
        labels = {
            name: torch.cat([labels_of_tokens(row[None], grid, side)[0] for row, grid in zip(wanted, grids, strict=True)])
            for name, wanted in cells.items()
        }
        counts = torch.tensor([grid.num_cells for grid in grids])
        for name, values in self.scene_attributes.items():
            labels[name] = labels_of_scene(batch, name, values).repeat_interleave(counts)
        return labels
