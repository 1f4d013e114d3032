"""The picture of each row, for methods that look at one picture at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.mistakes import MistakeError


def picture_of_each_row(batch: Batch) -> Tensor:
    """The first input image of each row, or the picture it asks for where it has none, ``[B, 3, H, W]``.

    Raises:
        ValueError: a row has neither.
    """
    pictures = []
    for row, key in enumerate(batch.keys):
        images = batch.images_of(row)
        if not len(images) and batch.targets is None:
            raise MistakeError(f"{key}: has no picture; accepted are rows with an image or a target")
        pictures.append(images[0] if len(images) else batch.targets[row])  # type: ignore[index]
    return torch.stack(pictures)
