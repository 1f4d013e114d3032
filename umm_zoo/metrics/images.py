"""Metrics of generated images and reconstructions: peak signal-to-noise ratio, that of the fine detail apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.metrics.rows import RowMetric, generated_pairs, rows_by_size, same_sizes
from umm_zoo.outputs import Outputs


def decibels(errors: Tensor) -> Tensor:
    """PSNR of mean squared errors where images lie in [-1, 1]; below half an 8-bit level, (1 / 255)^2, it would say nothing."""
    return 10 * torch.log10(4 / errors.clamp(min=(1 / 255) ** 2))


class PSNR(RowMetric):
    """Peak signal-to-noise ratio of generated against true images in decibels, averaged over images.

    Both lie in [-1, 1] (values outside are clamped, as saving the image would), so the peak is 2. An image's own mean squared
    error is floored at that of half an 8-bit level (our choice; about 54 dB), or one perfect image would make the mean infinite.
    Batches without ``generated`` are left out: a run may generate for the first batches of a validation only.

    Raises:
        UserError: there is nothing true to compare with, or an image differs from it in size.
    """

    reads = ("generated",)
    record_dtype = torch.float64

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Compare ``generated`` with what it should be."""
        if (pairs := generated_pairs(outputs, batch, self)) is not None:
            self.add_rows(rows_by_size(_decibels, *([part[row] for row in self.chosen(batch)] for part in pairs)))

    def compute(self) -> Tensor:
        """Mean over images; NaN when none was seen."""
        return self.records().mean()


class Reconstruction(RowMetric):
    """PSNR of whole images and of their high band alone, each beside the ceiling that the codec sets.

    The high band is what a 3 x 3 binomial blur takes away: edges and marks of one or two pixels. ``compute`` gives ``psnr`` and
    ``high_band`` in decibels (peak 2, means over images), and where the method makes ``round_trips``, the codec's decoded encodings
    of the true images, also ``psnr_ceiling`` and ``high_band_ceiling``: what a decoder that reproduces every latent would reach.
    Batches without ``generated`` are left out.

    Raises:
        UserError: there is nothing true to compare with, or an image differs from it in size.
    """

    reads = ("generated",)
    scores = ("psnr", "high_band", "psnr_ceiling", "high_band_ceiling")
    record_dtype = torch.float64

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Compare ``generated`` and ``round_trips`` with what they should be."""
        if (pairs := generated_pairs(outputs, batch, self)) is None:
            return
        rows, trips = self.chosen(batch), outputs.round_trips
        if trips is not None:
            same_sizes(self, batch, round_trip=trips, true=pairs[1])
        images, references = ([part[row] for row in rows] for part in pairs)
        values = rows_by_size(both_bands, images, references)
        ceilings = torch.full_like(values, torch.nan)
        if trips is not None:
            ceilings = rows_by_size(both_bands, [trips[row] for row in rows], references)
        self.add_rows(torch.cat([values, ceilings], dim=-1))

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Means over images; ceilings only where round trips were given."""
        names = ("psnr", "high_band", "psnr_ceiling", "high_band_ceiling")
        means = dict(zip(names, records.nanmean(dim=0), strict=True))
        return {name: value for name, value in means.items() if not value.isnan()}


class HighBandEnergy(RowMetric):
    """Energy of the high band of generated images over that of the true ones, of all together: 1 is right.

    Below 1 detail is missing; above 1 there is noise, or detail that is not there. See ``Reconstruction`` for the band; batches
    without ``generated`` are left out.

    Raises:
        UserError: there is nothing true to compare with.
    """

    reads = ("generated",)
    record_dtype = torch.float64

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Keep the energies of each row."""
        if (pairs := generated_pairs(outputs, batch, self)) is not None:
            rows = self.chosen(batch)
            energies = [rows_by_size(_band_energy, [part[row] for row in rows]) for part in pairs]
            self.add_rows(torch.stack(energies, dim=1) if rows else [])

    def compute(self) -> Tensor:
        """The ratio; NaN when no row was seen."""
        records = self.records()
        return records[:, 0].sum() / records[:, 1].sum() if len(records) else torch.tensor(torch.nan)


def _band_energy(images: Tensor) -> Tensor:
    """``[B]``."""
    return high_band(images.double().clamp(-1, 1)).square().flatten(1).mean(dim=1)


def _decibels(images: Tensor, references: Tensor) -> Tensor:
    """PSNR of whole images, ``[B, 1]``."""
    images, references = (part.double().clamp(-1, 1) for part in (images, references))
    return decibels((images - references).square().flatten(1).mean(dim=1, keepdim=True))


def both_bands(images: Tensor, references: Tensor) -> Tensor:
    """PSNR of whole images and of their high band, ``[B, 2]``."""
    difference = images.double().clamp(-1, 1) - references.double()
    errors = torch.stack([part.square().flatten(1).mean(dim=1) for part in (difference, high_band(difference))], dim=1)
    return decibels(errors)


def high_band(images: Tensor) -> Tensor:
    """Detail that a 3 x 3 binomial blur takes away, ``[B, C, H, W]``; borders are repeated."""
    line = torch.tensor([0.25, 0.5, 0.25], dtype=images.dtype, device=images.device)
    kernel = (line[:, None] * line[None, :]).expand(images.shape[1], 1, 3, 3)
    return images - F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])
