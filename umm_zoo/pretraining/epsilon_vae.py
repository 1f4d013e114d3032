"""Epsilon-VAE: an autoencoder whose decoder is a flow (Zhao et al., 2024, arXiv 2410.04081)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.diffusion_codec import DiffusionCodec, cells_of
from umm_zoo.batch import Batch, Images, by_size, image_of_each_row, map_by_size, stacked
from umm_zoo.errors import Share
from umm_zoo.objectives.reduction import mean_over_groups
from umm_zoo.outputs import Outputs, in_groups
from umm_zoo.pretraining.judged import Judged, Judges


class EpsilonVAE(Judged):
    """Epsilon-VAE: the velocity's error, and judges of the image that the velocity points at.

    The perceptual distance compares that image with the true one; a discriminator sees it with the point of the flow and its time
    (``TimeDiscriminator``), as the paper's does: without them it does not train. One image per row, its first input image or its
    target. Both have the weight .5 in the paper.

    Args:
        codec: encoder and flow.
        judges: None is none; the flow alone is worse than a plain decoder, the paper's own ablation says.
        statistics_momentum: see ``Judged``.
    """

    codec: DiffusionCodec
    codec_kind = DiffusionCodec

    def __init__(self, codec: DiffusionCodec, judges: Judges | None = None, statistics_momentum: Share = 0.99) -> None:
        super().__init__(codec, judges, statistics_momentum)

    @classmethod
    def load_codec(cls, source: str | Path, trust: Sequence[str] = (), raw_weights: bool = False) -> DiffusionCodec:
        """See ``Judged.load_codec``."""
        return cast(DiffusionCodec, super().load_codec(source, trust, raw_weights))

    def parts(self) -> dict[str, nn.Module]:
        """``encoder`` and ``decoder`` of the codec, and the judges."""
        return {"encoder": self.codec.encoder, "decoder": self.codec.denoiser, **self.judges.parts()}

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """See ``outputs.TakesImages``."""
        for images in (inputs, targets):
            cells = cells_of(self.codec.posterior(images)[0])
            self.codec.velocity(images, images.new_zeros(len(images)), cells)

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Terms of the images of a micro-batch, those of one size together."""
        groups, moments = [], torch.zeros(3, device=self.device)
        for places, images in by_size(image_of_each_row(batch)):
            latents = self.codec.posterior(images)[0]
            moments = moments + self.codec.moments(latents.detach())
            losses, made, point = self._terms(images, latents, None)
            groups.append((len(places), self.judges.competing(losses, images, made, self.step.number, point[0], point[1])))
        self.remember(moments)
        means = self.judges.settled(mean_over_groups(groups), self.codec.denoiser, self.step.number)
        return self.over_step(means, "rows", len(batch))

    def _terms(
        self, images: Tensor, latents: Tensor, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, Tensor]]:
        """Losses, the image that the velocity points at, and the point of the flow with its time."""
        noisy, time, velocity = self.codec.draw(images, generator)
        predicted = self.codec.velocity(noisy, time, cells_of(latents)).to(velocity.dtype)
        flow = F.mse_loss(predicted, velocity)
        made = self.codec.clean(noisy, time, predicted)
        return self.judges.seen({"loss": flow, "flow": flow}, images, made), made, (noisy, time)

    def units(self, batch: Batch) -> dict[str, float]:
        """``rows``."""
        return {"rows": len(batch)}

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return ("loss", "flow", *(() if self.judges.perceptual is None else ("perceptual",)), "generated", "references")

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """The losses at fixed times and noise, ``generated`` (drawn in the objective's steps), ``references``."""
        sizes = [image.shape for image in image_of_each_row(batch)]
        return in_groups(lambda rows: self._validate(rows, batch_idx), batch, sizes)

    def _validate(self, batch: Batch, seed: int) -> Outputs:
        """Outputs of rows whose images have one size."""
        images = stacked(image_of_each_row(batch))
        latents = self.codec.posterior(images)[0]
        losses = self._terms(images, latents, torch.Generator(images.device).manual_seed(seed))[0]
        return Outputs(losses, generated=self.round_trip(images), references=list(images))

    def reconstruct(self, images: Images, seed: int = 0) -> list[Tensor]:
        """Images through the codec and back, drawn from its own noise, whatever the seed."""
        return self.round_trip(images)

    @torch.no_grad()
    def round_trip(self, images: Images) -> list[Tensor]:
        """Images through the codec and back."""
        return map_by_size(lambda stack: self.codec.decode(self.codec.encode(stack)).clamp(-1, 1), images)
