"""What every image codec has: images to the latents that a decoder is trained on, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from umm_zoo.backbones.precision import ExactBuffers
from umm_zoo.batch import Batch, Grid, map_by_size
from umm_zoo.errors import Count, Finite, Positive, UserError

#: Name in ``Batch.extras`` of stored latents of the input images; those of the images to generate are called ``latents``.
SOURCE_LATENTS = "source_latents"


class LatentCodec(ExactBuffers, ABC):
    """Map from images to normalised latents and back; scaling and shift live here and nowhere else.

    ``encode`` gives ``(z - shift) * scaling`` of the network's own latent z, about zero mean and unit deviation, and ``decode``
    undoes it. Subclasses implement the network's own side, ``posterior`` and ``expand``.

    Shape:
        - encode: ``[B, 3, H, W]`` in [-1, 1] to ``[B, C, H/f, W/f]``
        - decode: ``[B, C, h, w]`` to ``[B, 3, h*f, w*f]``, not clamped

    Attributes:
        latent_channels: C.
        downsampling: f, pixels per latent cell along one side.
        has_shift: whether the format has a shift beside the scaling.
    """

    exact: ClassVar[tuple[str, ...]] = ("scaling", "shift")
    latent_channels: int
    downsampling: int
    has_shift: ClassVar[bool] = True
    model: Any
    scaling: Tensor
    shift: Tensor

    def __init__(self, latent_channels: Count, downsampling: Count, scaling: Positive, shift: Finite) -> None:
        super().__init__()
        self.latent_channels, self.downsampling = latent_channels, downsampling
        # buffers, because a trained codec's own statistics must travel in its checkpoint
        self.register_buffer("scaling", torch.tensor(float(scaling)))
        self.register_buffer("shift", torch.tensor(float(shift)))

    @abstractmethod
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log variance of the network's own latent, ``[B, C, h, w]`` each; None for a codec without noise."""

    @abstractmethod
    def expand(self, latents: Tensor) -> Tensor:
        """Images of the network's own (neither shifted nor scaled) latents."""

    def latent_grid(self, height: int, width: int, patch: int = 1) -> Grid:
        """Cells of the latent of an image of that many pixels; a decoder may need a whole number of its ``patch`` on each side.

        Raises:
            UserError: a side is no such multiple.
        """
        unit = self.downsampling * patch
        if height % unit or width % unit:
            raise UserError("", f"{height} x {width} px", f"multiples of {unit} px for an image to generate")
        return Grid(height // self.downsampling, width // self.downsampling)

    def checked(self, stored: list[Tensor]) -> list[Tensor]:
        """Stored latents, if they can be this codec's.

        Raises:
            UserError: they are of another form.
        """
        for own in stored:
            if own.ndim != 3 or len(own) != self.latent_channels:
                raise UserError("extras.latents", f"{list(own.shape)} for an image", f"[{self.latent_channels}, h, w], the codec's")
        return stored

    @torch.no_grad()
    def target_latents(self, batch: Batch) -> list[Tensor]:
        """Latents ``[C, h, w]`` of the images to generate: those of the shards where they hold any (``extras["latents"]``).

        Raises:
            UserError: there is nothing to generate.
        """
        if (stored := stored_latents(batch)) is not None:
            return self.checked(stored)
        if not batch.requested:
            raise UserError("", "no image to generate", "rows with a target (KEY.target.png)", row=0)
        return map_by_size(self.encode, batch.requested)

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents of ``images``.

        Args:
            images: ``[B, 3, H, W]`` in [-1, 1].
            sample: draw from the posterior (a codec without noise gives its latent either way); otherwise its mean.
            generator: source of randomness.

        Raises:
            UserError: H or W is not a multiple of ``downsampling``.
        """
        if any(side % self.downsampling for side in images.shape[-2:]):
            expected = f"multiples of {self.downsampling}, as {type(self).__name__} needs them"
            raise UserError("data.image_size", f"images of {list(images.shape[-2:])} pixels", expected)
        mean, log_variance = self.posterior(images)
        made = draw(mean, log_variance, generator) if sample else mean
        return self.normalise(made.to(images.dtype))  # what a network of narrower weights made is not rounded once more

    def decode(self, latents: Tensor) -> Tensor:
        """Images of normalised latents, in about [-1, 1]."""
        return self.expand(latents / self.scaling.to(latents.dtype) + self.shift.to(latents.dtype)).to(latents.dtype)

    def normalise(self, latents: Tensor) -> Tensor:
        """``(z - shift) * scaling`` of the network's own latents."""
        return (latents - self.shift.to(latents.dtype)) * self.scaling.to(latents.dtype)

    @torch.no_grad()
    def moments(self, latents: Tensor) -> Tensor:
        """Number, sum and sum of squares of the network's own latents without the shift, ``[3]``; those of parts add up."""
        values = latents.to(self.shift.dtype) - self.shift
        return torch.stack([values.new_tensor(float(values.numel())), values.sum(), values.square().sum()])

    @torch.no_grad()
    def track_moments(self, moments: Tensor, momentum: float) -> None:
        """Move shift and scaling towards the mean and 1/deviation of the latents of ``moments``, while the network is trained."""
        mean, square = moments[1:] / moments[0].clamp(min=1)
        pace = (1 - momentum) * (moments[0] > 0)
        moved = pace * mean * self.has_shift
        self.shift += moved
        self.scaling.copy_((self.scaling**-2).lerp(square - 2 * moved * mean + moved.square(), pace).rsqrt())


def stored_latents(batch: Batch) -> list[Tensor] | None:
    """Latents of the shards as floats, one per entry; None where they hold none."""
    values = batch.extras.get("latents")
    if isinstance(values, list):
        return [value.float() for value in values]
    return None if values is None else list(values.float())


def draw(mean: Tensor, log_variance: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
    """A sample of the diagonal Gaussian posterior; the mean itself where there is no noise."""
    if log_variance is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + torch.exp(0.5 * log_variance) * noise
