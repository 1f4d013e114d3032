"""How much of an image survives, its fine detail apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import MistakeError
from umm_zoo.metrics.rows import RowMetric, chosen_rows, required

#: Mean squared error of half an 8-bit level where images lie in [-1, 1]; below it decibels say nothing.
_FLOOR = (1 / 255) ** 2


class Reconstruction(RowMetric):
    """PSNR of whole images and of their high band alone, each beside the ceiling that the codec sets.

    The high band is what a 3 x 3 binomial blur takes away: edges and marks of one or two pixels. ``compute`` gives ``psnr`` and
    ``high_band`` in decibels (peak 2, means over images), and where the method returns ``outputs["round_trips"]``, the codec's
    decoded encodings of the true images, also ``psnr_ceiling`` and ``high_band_ceiling``: what a decoder that reproduces every
    latent would reach. A batch whose ``images`` is None is left out.

    Args:
        kinds: count these kinds only.
        tasks: count these tasks only.

    Raises:
        ValueError: ``outputs`` has no ``images``, there is nothing true to compare with, or shapes differ.
    """

    def __init__(self, kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        super().__init__(torch.float64)
        self.kinds, self.tasks = kinds, tasks

    def update(self, outputs: dict[str, Any], batch: Batch) -> None:
        """Compare ``outputs["generated"]`` with ``outputs["originals"]``, or with the batch's targets where there are none."""
        if "generated" in outputs and outputs["generated"] is None:
            return
        images, originals = required(outputs, "generated", self), outputs.get("originals", batch.targets)
        trips = outputs.get("round_trips")
        if originals is None or originals.shape != images.shape:
            found = "nothing" if originals is None else list(originals.shape)
            raise MistakeError(f"metrics.Reconstruction: images are {list(images.shape)}, to compare with there is {found}")
        rows = chosen_rows(batch, self.kinds, self.tasks)
        values = decibels(images[rows], originals[rows])
        nothing = torch.full_like(values, torch.nan)
        self.add_rows(torch.cat([values, nothing if trips is None else decibels(trips[rows], originals[rows])], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Means over images; ceilings only where round trips were given, nothing without rows."""
        records = self.records()
        if not len(records):
            return {}
        names = ("psnr", "high_band", "psnr_ceiling", "high_band_ceiling")
        means = dict(zip(names, records.nanmean(dim=0), strict=True))
        return {name: value for name, value in means.items() if not value.isnan()}


def decibels(images: Tensor, originals: Tensor) -> Tensor:
    """PSNR of whole images and of their high band, ``[B, 2]``."""
    difference = images.double().clamp(-1, 1) - originals.double()
    errors = torch.stack([part.square().flatten(1).mean(dim=1) for part in (difference, high_band(difference))], dim=1)
    return 10 * torch.log10(4 / errors.clamp(min=_FLOOR))


def high_band(images: Tensor) -> Tensor:
    """What a 3 x 3 binomial blur takes away, ``[B, C, H, W]``; borders are repeated."""
    line = torch.tensor([0.25, 0.5, 0.25], dtype=images.dtype, device=images.device)
    kernel = (line[:, None] * line[None, :]).expand(images.shape[1], 1, 3, 3)
    return images - F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])
