"""Rows of a batch, encoded ahead of its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from umm_zoo.backbones.encoded_rows import EncodedRow, LayoutRule, RowCache, RowEncoder, layouts_of, requests_of
from umm_zoo.backbones.preparation import Asked, Prepared
from umm_zoo.backbones.processed_images import ProcessedImages
from umm_zoo.backbones.vlm_processor import tensors_of
from umm_zoo.batch import Batch


@dataclass
class ImagePreparation:
    """Image processor of the library, for the images of each row.

    Args:
        how, settings: see ``vlm_processor.processed``.
        dtype: of what the tower takes.
    """

    how: Any
    settings: Mapping[str, Any]
    dtype: torch.dtype

    def __call__(self, images: Sequence[NDArray[np.uint8]], image_counts: Sequence[int]) -> ProcessedImages:
        """What is made of images in bytes, each row alone."""
        left = iter(images)
        rows = [[Image.fromarray(image) for image in islice(left, count)] for count in image_counts if count]
        return ProcessedImages.of([self._of_row(row) for row in rows])

    def _of_row(self, row: list[Image.Image]) -> dict[str, Tensor]:
        made = tensors_of(self.how([row], return_tensors="pt", **self.settings))
        return {name: own.to(self.dtype) if own.is_floating_point() else own for name, own in made.items()}


@dataclass
class RowPreparation:
    """Preparation of the rows that the steps on a batch will ask for.

    Args:
        encoder: of rows.
        rule: layout of images.
        asked: what a batch will be asked for.
        known: where the model looks for rows; left behind when this goes to another process.
        process: what is made of the images of each row; None where the step does it on its device.
    """

    encoder: RowEncoder
    rule: LayoutRule
    asked: Callable[[Batch], Iterable[Asked]]
    known: RowCache | None
    process: ImagePreparation | None = None

    def __call__(self, outline: Batch, images: Sequence[NDArray[np.uint8]]) -> Prepared:
        """All rows but those that the model refuses: the process that trains finds out again and says it."""
        requests = [
            request
            for batch, for_generation, opening in self.asked(outline)
            for request in requests_of(
                batch.prompts() if for_generation else batch.conversations,
                layouts_of(batch.images, batch.image_counts, self.rule),
                for_generation,
                opening,
            )
        ]
        different = list(dict.fromkeys(requests))
        made = zip(different, self.encoder(different), strict=True)
        rows = {(request, self.encoder.max_length): row for request, row in made if isinstance(row, EncodedRow)}
        return Prepared(rows, self.process(images, outline.image_counts) if self.process and images else None)

    def take(self, prepared: Prepared) -> None:
        """As the protocol says."""
        if self.known is not None:
            self.known.add(prepared.rows)
            prepared.rows = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(replace(self, known=None))
