"""Metric of generated images: peak signal-to-noise ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from umm_zoo.batch import Batch
from umm_zoo.metrics.rows import RowMetric, generated_pairs
from umm_zoo.outputs import Outputs

_CEILING = 20 * math.log10(2 / (1 / 255))  # half of an 8-bit level is 1/255 where images lie in [-1, 1]


class PSNR(RowMetric):
    """Peak signal-to-noise ratio of generated against true images in decibels, averaged over images.

    Both lie in [-1, 1] (values outside are clamped, as saving the image would), so the peak is 2. An image's own mean squared
    error is floored at that of half an 8-bit level (our choice; about 54 dB), or one perfect image would make the mean infinite.
    Batches without ``generated`` are left out: a run may generate for the first batches of a validation only.

    Raises:
        UserError: there is nothing true to compare with, or the shapes differ.
    """

    reads = ("generated",)
    record_dtype = torch.float64

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Compare ``generated`` with what it should be."""
        pairs, rows = generated_pairs(outputs, batch, self), self.chosen(batch)
        if pairs is None or not rows:
            return
        images, references = (part[rows].double() for part in pairs)
        values = peak_signal_noise_ratio(images, references, data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3))
        self.add_rows(values.clamp(max=_CEILING)[:, None])

    def compute(self) -> Tensor:
        """Mean over images; NaN when none was seen."""
        return self.records().mean()
