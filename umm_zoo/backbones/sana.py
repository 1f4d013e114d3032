"""Sana through diffusers: a linear-attention transformer over the 32-channel latents of a deep-compression codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from diffusers.models import SanaTransformer2DModel
from torch import Tensor

from umm_zoo.backbones.diffusers_loading import built, loaded
from umm_zoo.backbones.image_decoder import ImageDecoder

#: Times of the schedule that Sana was trained with.
NUM_TRAIN_TIMES = 1000


class Sana(ImageDecoder):
    """Sana's transformer (Xie et al., 2024, arXiv 2410.10629): the decoder of WeMMU, MetaQuery, OpenUni and BLIP3o-NEXT.

    The condition is read by cross-attention alone, after the network's own projection and norm; there are no position embeddings
    (``interpolation_scale`` null), so the condition must say what goes where. The 1.6B network has 20 layers of width 2240 and
    reads tokens of width 2304; ``Sana_1600M_512px_diffusers`` and ``Sana_1600M_1024px_diffusers`` hold it in the subfolder
    ``transformer``.

    Args:
        model: the library's network.
        condition_rms: root mean square of the tokens it is at home with. The square root of 5.5 is where MetaQuery and BLIP3o-NEXT
            start the norm at the end of their connectors when they aim at Sana (their released code).

    Raises:
        ValueError: a network with an embedded guidance scale (Sana-Sprint), which is sampled in another way.
    """

    def __init__(self, model: SanaTransformer2DModel, condition_rms: float = 5.5**0.5) -> None:
        super().__init__()
        config: Any = model.config
        if config.guidance_embeds:
            raise ValueError("Sana: config has guidance_embeds = True (Sana-Sprint); expected networks without")
        self.model, self.condition_rms = model, condition_rms
        self.condition_dim, self.latent_channels, self.patch = config.caption_channels, config.in_channels, config.patch_size

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        condition_rms: float = 5.5**0.5,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Random weights from the library's config keys (``num_layers``, ``caption_channels`` …); {} is the 1.6B network's.

        The library's default ``sample_size`` only matters with position embeddings.
        """
        return cls(built(SanaTransformer2DModel, config, dtype), condition_rms)._prepared(gradient_checkpointing)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        condition_rms: float = 5.5**0.5,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> Self:
        """A folder in diffusers' format or a name on the hub; ``subfolder`` is ``transformer`` inside a whole pipeline.

        On the meta device with ``config`` given nothing is read.

        Raises:
            ValueError: the weights do not fill the network exactly.
        """
        return cls(loaded(SanaTransformer2DModel, source, config, subfolder, dtype), condition_rms)._prepared(
            gradient_checkpointing
        )

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The library's forward, told the time as its own pipeline tells it (0 to 1000, times the config's factor)."""
        predicted: Tensor = self.model(
            noisy,
            encoder_hidden_states=values,
            timestep=time * NUM_TRAIN_TIMES * self.model.config.timestep_scale,
            encoder_attention_mask=None if mask is None else mask.to(values.dtype),
            return_dict=False,
        )[0]
        return predicted

    def save(self, folder: str | Path) -> None:
        """diffusers' format: ``config.json`` and ``diffusion_pytorch_model.safetensors``."""
        self.model.save_pretrained(folder)

    def _prepared(self, gradient_checkpointing: bool) -> Self:
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()
        return self
