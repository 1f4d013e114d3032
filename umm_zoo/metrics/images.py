"""How close drawn images come to true ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio

from umm_zoo.batch import Batch
from umm_zoo.errors import MistakeError
from umm_zoo.metrics.rows import chosen_rows, required

_CEILING = 20 * math.log10(2 / (1 / 255))  # half of an 8-bit level is 1/255 where images lie in [-1, 1]


class PSNR(Metric):
    """Peak signal-to-noise ratio of drawn against true images in decibels, averaged over images.

    Both lie in [-1, 1] (values outside are clamped, as saving the image would), so the peak is 2. An image's own mean squared
    error is floored at that of half an 8-bit level (our choice; about 54 dB), or one perfect image would make the mean infinite.
    A batch whose ``outputs["generated"]`` is None is left out: methods may draw the first batches of a validation only.

    Args:
        kinds, tasks: count these rows only.

    Raises:
        ValueError: ``outputs`` has no ``images`` [B, 3, H, W], there is neither ``outputs["originals"]`` nor ``batch.targets`` to
            compare with, or the shapes differ.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        super().__init__()
        self.kinds, self.tasks = kinds, tasks
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: dict[str, Any], batch: Batch) -> None:
        """Compare ``outputs["generated"]`` with ``outputs["originals"]``, or with the batch's targets where there are none."""
        if "generated" in outputs and outputs["generated"] is None:
            return
        images, originals = required(outputs, "generated", self), outputs.get("originals", batch.targets)
        if originals is None or originals.shape != images.shape:
            found = "nothing" if originals is None else list(originals.shape)
            raise MistakeError(f"metrics.PSNR: images are {list(images.shape)}, to compare with there is {found}")
        rows = chosen_rows(batch, self.kinds, self.tasks)
        if not rows:
            return
        values = peak_signal_noise_ratio(
            images[rows].double(), originals[rows].double(), data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3)
        )
        self.total += values.clamp(max=_CEILING).sum()
        self.count += len(rows)

    def compute(self) -> Tensor:
        """Mean over images; NaN when none was seen."""
        return self.total / self.count
