"""Sana through diffusers: a linear-attention transformer over the 32-channel latents of a deep-compression codec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers.models import SanaTransformer2DModel
from torch import Tensor

from umm_zoo.backbones.diffusers_decoder import DiffusersDecoder


class Sana(DiffusersDecoder):
    """Sana's transformer (Xie et al., 2024, arXiv 2410.10629): the decoder of WeMMU, MetaQuery, OpenUni and BLIP3o-NEXT.

    The condition enters by cross-attention alone, after the network's own projection and norm; there are no position embeddings
    (``interpolation_scale`` null), so the condition must say what goes where. The 1.6B network has 20 layers of width 2240 and
    takes tokens of width 2304 (``from_config({})``); ``Sana_1600M_512px_diffusers`` and ``Sana_1600M_1024px_diffusers`` hold it in
    the subfolder ``transformer``. ``sample_size`` only matters with position embeddings.

    The root mean square of the tokens that it is at home with is the square root of 5.5: where MetaQuery and BLIP3o-NEXT start the
    norm at the end of their connectors when they aim at Sana (their released code).

    Args:
        model: the library's network.

    Raises:
        ValueError: a network with an embedded guidance scale (Sana-Sprint), which is sampled in another way.
    """

    kind = SanaTransformer2DModel
    condition_rms = 5.5**0.5
    release_scheduler: ClassVar[dict[str, Any]] = {
        "_class_name": "DPMSolverMultistepScheduler",
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }

    def __init__(self, model: SanaTransformer2DModel) -> None:
        super().__init__()
        config: Any = model.config
        self.assert_fit(config)
        self.model = model
        self.condition_dim, self.latent_channels, self.patch = config.caption_channels, config.in_channels, config.patch_size

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``."""
        super().assert_fit(config)
        if config["guidance_embeds"]:
            raise ValueError("Sana: found a config with guidance_embeds (Sana-Sprint), expected a network without")

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The library's forward, with the time as its own pipeline gives it (0 to 1000, times the config's factor)."""
        predicted: Tensor = self.model(
            noisy,
            encoder_hidden_states=values,
            timestep=time * self.num_train_times * self.model.config.timestep_scale,
            encoder_attention_mask=None if mask is None else mask.to(values.dtype),
            return_dict=False,
        )[0]
        return predicted
