"""Image codecs of the diffusers library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import Tensor

from umm_zoo.backbones.diffusers_loading import DiffusersNetwork
from umm_zoo.backbones.latent_codec import LatentCodec


class LibraryCodec(DiffusersNetwork, LatentCodec):
    """A codec of the diffusers library; scaling and shift stand in the config of its network."""

    def expand(self, latents: Tensor) -> Tensor:
        """The decoder network."""
        return self.model.decode(latents.to(self.model.dtype)).sample

    def save(self, folder: str | Path) -> None:
        """As ``DiffusersNetwork.save``, with the statistics that training has moved."""
        for name, value in (("scaling_factor", self.scaling), ("shift_factor", self.shift)):
            if value != torch.tensor(self.model.config.get(name) or 0.0):  # 0.3611 stays 0.3611, not its float32 neighbour
                self.model.register_to_config(**{name: float(value)})
        super().save(folder)


class KLCodec(LibraryCodec):
    """A variational autoencoder with a small KL term (Rombach et al., 2022, arXiv 2112.10752, section 3.1), ``AutoencoderKL``.

    The codec of Stable Diffusion 1 to 3.5 and of FLUX. FLUX.1's has 16 channels at factor 8, scaling 0.3611 and shift 0.1159;
    that of Stable Diffusion 3 the same network with 1.5305 and 0.0609.

    Args:
        model: the library's network.

    Raises:
        ValueError: its config asks for per-channel statistics, which no codec used here has.
    """

    kind = AutoencoderKL

    def __init__(self, model: AutoencoderKL) -> None:
        config: Any = model.config
        self.assert_fit(config)
        factor = 2 ** (len(config.block_out_channels) - 1)
        super().__init__(config.latent_channels, factor, config.scaling_factor, config.shift_factor or 0.0)
        self.model = model

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``."""
        if config["latents_mean"] is not None or config["latents_std"] is not None:
            raise ValueError("KLCodec: found a config with latents_mean or latents_std, expected scaling_factor and shift_factor")

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log variance (clamped by the library to [-30, 20])."""
        distribution = self.model.encode(images.to(self.model.dtype)).latent_dist
        return distribution.mean, distribution.logvar


class DCCodec(LibraryCodec):
    """A deep-compression autoencoder without noise (Chen et al., 2024, arXiv 2410.10733), ``AutoencoderDC``: Sana's codec.

    ``dc-ae-f32c32-sana-1.0`` has 32 channels at factor 32, scaling 0.41407 (the inverse root mean square of its latents), no shift.

    Args:
        model: the library's network.
    """

    kind = AutoencoderDC
    has_shift = False

    def __init__(self, model: AutoencoderDC) -> None:
        config: Any = model.config
        super().__init__(config.latent_channels, model.spatial_compression_ratio, config.scaling_factor, 0.0)
        self.model = model

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The latent itself; there is no variance."""
        return self.model.encode(images.to(self.model.dtype)).latent, None


class TinyCodec(LibraryCodec):
    """A small autoencoder distilled from a large one (TAESD, Bohan, 2023), ``AutoencoderTiny``: its latents, without noise.

    ``madebyollin/taesd``, ``taesdxl``, ``taesd3`` and ``taef1`` give the latents of the codecs of Stable Diffusion 1 and 2, SDXL,
    Stable Diffusion 3 and FLUX.1 in the scale that their decoders are trained on.

    Args:
        model: the library's network.

    Raises:
        ValueError: images come out in another size than they went in.
    """

    kind = AutoencoderTiny

    def __init__(self, model: AutoencoderTiny) -> None:
        config: Any = model.config
        self.assert_fit(config)
        factor = 2 ** (len(config.num_encoder_blocks) - 1)
        super().__init__(config.latent_channels, factor, config.scaling_factor, config.shift_factor)
        model.encoder.gradient_checkpointing = False  # the library's forgets to bring images to [0, 1] there
        self.model = model

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``."""
        factor = 2 ** (len(config["num_encoder_blocks"]) - 1)
        if (back := config["upsampling_scaling_factor"] ** (len(config["num_decoder_blocks"]) - 1)) != factor:
            raise ValueError(
                f"TinyCodec: found a network that shrinks by {factor} and enlarges by {back}, expected the same factor"
            )

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The latent itself; there is no variance."""
        return self.model.encode(images.to(self.model.dtype)).latents, None
