"""Codec whose decoder is a flow: pixels are drawn, in a few steps, given the latent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.denoisers import Denoiser
from umm_zoo.errors import Count, Natural, Positive, UserError
from umm_zoo.objectives.flow_matching import FlowMatching, Interpolant


class LatentEncoder(nn.Module, ABC):
    """Network from images to latents, without noise.

    Shape:
        ``[B, 3, H, W]`` -> ``[B, latent_channels, H/f, W/f]``

    Attributes:
        latent_channels: C.
        downsampling: f.
    """

    latent_channels: int
    downsampling: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Encode."""


class PixelDenoiser(Denoiser):
    """Network over noisy pixels, given the cells of a latent.

    Shape:
        - noisy: ``[B, 3, H, W]``
        - time: ``[B]`` in [0, 1]
        - condition: ``[B, h*w, condition_dim]``, the cells of the latent in raster order, H/h = W/w
        - output: ``[B, 3, H, W]``

    Attributes:
        condition_dim: channels of the latent.
        unit: whose multiples H and W are.
    """

    condition_dim: int
    unit: int


def cells_beside(condition: Tokens, height: int, width: int, cell: int = 1) -> Tensor:
    """Cells of a latent, enlarged to one for every ``cell`` x ``cell`` pixels of ``H`` x ``W``: ``[B, C, H/cell, W/cell]``."""
    factor = math.isqrt(height * width // condition.values.shape[1])
    cells = condition.values.transpose(1, 2).unflatten(2, (height // factor, width // factor))
    return F.interpolate(cells, size=(height // cell, width // cell))


class ConvEncoder(LatentEncoder):
    """The convolutional encoder of latent diffusion's codecs, without noise: diffusers' ``Encoder``.

    Shape:
        ``[B, 3, H, W]`` -> ``[B, latent_channels, H/f, W/f]``, f = 2 to the power of the number of levels less one

    Args:
        latent_channels: C.
        channels: of the levels, fine to coarse.
        layers_per_block: residual blocks per level.
        groups: of the group norms.
    """

    def __init__(self, latent_channels: Count, channels: Sequence[Count], layers_per_block: Count = 2, groups: Count = 32) -> None:
        super().__init__()
        self.latent_channels, self.downsampling = latent_channels, 2 ** (len(channels) - 1)
        self.encoder = Encoder(
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            norm_num_groups=groups,
            double_z=False,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode."""
        latents: Tensor = self.encoder(images)
        return latents


class UNetPixelDenoiser(PixelDenoiser):
    """U-Net over noisy pixels with the latent beside them, enlarged to their size: diffusers' ``UNet2DModel``.

    Shape:
        - noisy: ``[B, 3, H, W]``
        - time: ``[B]`` in [0, 1]
        - condition: ``[B, h*w, condition_dim]``, the cells of the latent in raster order, H/h = W/w
        - output: ``[B, 3, H, W]``

    Args:
        condition_dim: channels of the latent.
        channels: of the levels, fine to coarse.
        layers_per_block: residual blocks per level.
        groups: of the group norms.

    Attributes:
        unit: whose multiples H and W are, for the halvings between the levels.
    """

    def __init__(self, condition_dim: Count, channels: Sequence[Count], layers_per_block: Count = 2, groups: Count = 32) -> None:
        super().__init__()
        self.condition_dim, self.unit = condition_dim, 2 ** (len(channels) - 1)
        self.unet = UNet2DModel(
            in_channels=3 + condition_dim,
            out_channels=3,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            norm_num_groups=groups,
        )

    def forward(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """Predict."""
        beside = cells_beside(condition, *noisy.shape[-2:]).to(noisy.dtype)
        predicted: Tensor = self.unet(torch.cat([noisy, beside], dim=1), 1000 * time).sample
        return predicted


class DiffusionCodec(LatentCodec):
    """Codec of a plain encoder and a decoder that draws (Epsilon-VAE: Zhao et al., 2024, arXiv 2410.04081).

    The flow runs between noise and ``gamma`` times the image: ``x_t = (1 - t) gamma x + t e`` and ``v = e - gamma x``, so that
    ``x = (x_t - t v) / gamma``. The network gets x_t at unit variance. ``decode`` starts from the noise of ``seed``, each image of
    a batch from the same, so that an image does not depend on its neighbours.

    Args:
        encoder: images to latents; it has ``latent_channels`` and ``downsampling``.
        denoiser: of pixels, given the latent.
        objective: of the flow: the paper has ``LogitNormalTimes``, 3 steps on ``ReversedLog``, Euler.
        gamma: .6 in the paper, which leaves open where it enters; of the whole state it would change nothing.
        image_deviation: of the pixels, for the unit variance of the input (our choice).
        seed: of the decoder's noise.
        drawn: False makes the same network a plain decoder, the control of the flow: it always sees zeros in place of noise, at
            time 1, and gives the image in one step; times, steps and noise of the objective do not matter then.

    Raises:
        ValueError: a denoiser of other latents.
    """

    def __init__(
        self,
        encoder: LatentEncoder,
        denoiser: PixelDenoiser,
        objective: FlowMatching,
        gamma: Positive = 0.6,
        image_deviation: Positive = 0.5,
        seed: Natural = 0,
        drawn: bool = True,
    ) -> None:
        super().__init__(encoder.latent_channels, encoder.downsampling, scaling=1.0, shift=0.0)
        if denoiser.condition_dim != encoder.latent_channels:
            found = f"{denoiser.condition_dim} channels, and {encoder.latent_channels} of the encoder"
            raise ValueError(f"DiffusionCodec.denoiser.condition_dim: found {found}, expected one number")
        self.encoder, self.denoiser, self.objective = encoder, denoiser, objective
        self.gamma, self.image_deviation, self.seed, self.drawn = gamma, image_deviation, seed, drawn

    def posterior(self, images: Tensor) -> tuple[Tensor, None]:
        """See ``LatentCodec.posterior``; no noise.

        Raises:
            UserError: a side that is no multiple of what encoder and U-Net halve it to.
        """
        self.latent_grid(*images.shape[-2:])
        return self.encoder(images.to(next(self.encoder.parameters()).dtype)), None

    def latent_grid(self, height: int, width: int, patch: int = 1) -> Grid:
        """See ``LatentCodec.latent_grid``; the U-Net's halvings count too."""
        if height % (unit := math.lcm(self.downsampling, self.denoiser.unit)) or width % unit:
            raise UserError("data.image_size", f"{height} x {width} px", f"multiples of {unit} px, as the codec halves them")
        return super().latent_grid(height, width, patch)

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Interpolant:
        """Points between images and noise, for training."""
        if not self.drawn:
            nothing = torch.zeros_like(images)
            return self.objective.interpolate(self.gamma * images, images.new_ones(len(images)), nothing)
        return self.objective.draw(self.gamma * images, generator)

    def velocity(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """What the network says at ``noisy`` [B, 3, H, W] and ``time`` [B]."""
        t = time[:, None, None, None].to(noisy.dtype)
        spread = ((self.gamma * (1 - t) * self.image_deviation) ** 2 + t**2).sqrt()
        predicted: Tensor = self.denoiser(noisy / spread, time.to(noisy.dtype), condition)
        return predicted

    def clean(self, noisy: Tensor, time: Tensor, velocity: Tensor) -> Tensor:
        """The image that a velocity points at."""
        return (noisy - time[:, None, None, None].to(noisy.dtype) * velocity) / self.gamma

    @torch.no_grad()
    def expand(self, latents: Tensor, num_steps: int | None = None) -> Tensor:
        """See ``LatentCodec.expand``; drawn in the objective's number of steps or another."""
        height, width = (self.downsampling * side for side in latents.shape[-2:])
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(1, 3, height, width, generator=generator).to(latents).expand(len(latents), -1, -1, -1)
        noise, num_steps = (noise, num_steps) if self.drawn else (torch.zeros_like(noise), 1)
        shape = (len(latents), 3, height, width)
        made = self.objective.sample(self.velocity, shape, cells_of(latents), noise=noise, num_steps=num_steps)
        return made / self.gamma


def cells_of(latents: Tensor) -> Tokens:
    """A latent ``[B, C, h, w]`` as a condition, a token per cell."""
    return Tokens(latents.flatten(2).transpose(1, 2))
