"""Codecs of diffusers whose networks bring the statistics of every channel: RAE, FLUX.2's and Qwen-Image's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from diffusers.models import AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderRAE
from torch import Tensor

from umm_zoo.backbones.by_shape import constants
from umm_zoo.backbones.codecs import LibraryCodec
from umm_zoo.backbones.diffusers_loading import DiffusersNetwork
from umm_zoo.batch import Grid
from umm_zoo.errors import UserError


class NormedCodec(LibraryCodec):
    """Codec whose latents its network has normed, channel by channel; scaling is 1, shift 0, and training moves neither.

    Args:
        latent_channels, downsampling: see ``LatentCodec``.
    """

    def __init__(self, latent_channels: int, downsampling: int) -> None:
        super().__init__(latent_channels, downsampling, 1.0, 0.0)

    def track_moments(self, moments: Tensor, momentum: float) -> None:
        """Nothing: the statistics are the release's."""

    def save(self, folder: str | Path) -> None:
        """As ``DiffusersNetwork.save``."""
        DiffusersNetwork.save(self, folder)


class RAECodec(NormedCodec):
    """A representation autoencoder (Zheng et al., 2025, arXiv 2510.11690): a frozen image encoder, and a decoder of its patches.

    Latents are the normed patch tokens of DINOv2, SigLIP 2 or MAE (768 channels for a base model), without noise. The decoder makes
    squares of one size, ``image_size``, alone: images of other sizes are refused, where the library would squeeze them.

    Args:
        model: the library's network.

    Raises:
        ValueError: a network whose latents are no maps (``reshape_to_2d`` false).
    """

    kind = AutoencoderRAE

    def __init__(self, model: AutoencoderRAE) -> None:
        config: Any = model.config
        self.assert_fit(config)
        super().__init__(config.encoder_hidden_size, config.patch_size)
        self.model, self.image_size = model, model.decoder_image_size

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``."""
        if not config["reshape_to_2d"]:
            raise ValueError("RAECodec: found a config with reshape_to_2d false, expected a network whose latents are maps")

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The latent itself; there is no variance."""
        height, width = images.shape[-2:]
        self.latent_grid(height, width)
        return self.model.encode(images.to(self.model.dtype) / 2 + 0.5).latent, None

    def expand(self, latents: Tensor) -> Tensor:
        """The decoder network."""
        return super().expand(latents) * 2 - 1

    def latent_grid(self, height: int, width: int, patch: int = 1) -> Grid:
        """See ``LatentCodec``; one size alone."""
        if (height, width) != (self.image_size, self.image_size):
            expected = f"{self.image_size} x {self.image_size} px, the one size of this RAECodec"
            raise UserError("data.image_size", f"images of {height} x {width} px", expected)
        return super().latent_grid(height, width, patch)


class Flux2Codec(NormedCodec):
    """FLUX.2's variational autoencoder, ``AutoencoderKLFlux2``: 2 x 2 of its cells are one here, of 128 channels at factor 16.

    The running statistics of a norm over the packed channels, which travel with the weights, bring each to mean 0 and deviation 1.

    Args:
        model: the library's network.
    """

    kind = AutoencoderKLFlux2

    def __init__(self, model: AutoencoderKLFlux2) -> None:
        config: Any = model.config
        super().__init__(4 * config.latent_channels, 2 ** len(config.block_out_channels))
        self.model = model

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log variance of the packed, normed latent."""
        found = self.model.encode(images.to(self.model.dtype)).latent_dist
        mean, deviation = self._statistics(found.mean)
        return (F.pixel_unshuffle(found.mean, 2) - mean) / deviation, F.pixel_unshuffle(found.logvar, 2) - 2 * deviation.log()

    def expand(self, latents: Tensor) -> Tensor:
        """The decoder network."""
        mean, deviation = self._statistics(latents)
        return super().expand(F.pixel_shuffle(latents * deviation + mean, 2))

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, ``[1, 4 C, 1, 1]``."""
        norm, eps = self.model.bn, self.model.config.batch_norm_eps
        mean, variance = (value.view(1, -1, 1, 1).to(like) for value in (norm.running_mean, norm.running_var))
        return mean, (variance + eps).sqrt()


class QwenImageCodec(NormedCodec):
    """Qwen-Image's variational autoencoder, ``AutoencoderKLQwenImage``, that of a video model: an image is a film of one frame.

    16 channels at factor 8; its configuration holds each channel's mean and deviation.

    Args:
        model: the library's network.
    """

    kind = AutoencoderKLQwenImage

    def __init__(self, model: AutoencoderKLQwenImage) -> None:
        config: Any = model.config
        super().__init__(config.z_dim, model.spatial_compression_ratio)
        self.model = model

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log variance of the normed latent."""
        found = self.model.encode(images.to(self.model.dtype)[:, :, None]).latent_dist
        mean, deviation = self._statistics(found.mean)
        return (found.mean[:, :, 0] - mean) / deviation, found.logvar[:, :, 0] - 2 * deviation.log()

    def expand(self, latents: Tensor) -> Tensor:
        """The decoder network."""
        mean, deviation = self._statistics(latents)
        return super().expand((latents * deviation + mean)[:, :, None])[:, :, 0]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, ``[1, C, 1, 1]``."""
        config = self.model.config
        own = (tuple(values) for values in (config.latents_mean, config.latents_std))
        mean, std = (constants(like.device, values, like.dtype).view(1, -1, 1, 1) for values in own)
        return mean, std
