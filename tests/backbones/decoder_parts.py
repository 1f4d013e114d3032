"""Decoders of every family at toy size, and the library's own pipelines around the same networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import diffusers.schedulers
import torch
from torch import Tensor

from tests.tiny_configs import codec
from umm_zoo.backbones.diffusers_decoder import DiffusersDecoder
from umm_zoo.backbones.discrete_decoders import PixArt, StableDiffusion, StableDiffusionXL
from umm_zoo.backbones.flow_decoders import Flux

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
UNET = {
    "sample_size": 6,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 10,
}
SDXL_CONFIG = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 6,
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2],
}
PIXART = {**HEADS, "num_layers": 1, "cross_attention_dim": 16, "caption_channels": 10, "sample_size": 6, "norm_num_groups": 4}
FLUX = {
    **HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 10, "pooled_projection_dim": 6,
    "axes_dims_rope": [4, 2, 2],
}  # fmt: skip
V_PREDICTION = {**StableDiffusion.release_scheduler, "prediction_type": "v_prediction", "_class_name": "DDIMScheduler"}

#: By name: class, configuration, scheduler (None: that of the release).
DECODERS: dict[str, tuple[type[DiffusersDecoder], dict[str, Any], dict[str, Any] | None]] = {
    "FLUX.1 dev": (Flux, {**FLUX, "guidance_embeds": True}, None),
    "FLUX.1 schnell": (Flux, FLUX, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}),
    "SD 1.5": (StableDiffusion, UNET, None),
    "SD 2.1": (StableDiffusion, {**UNET, "use_linear_projection": True, "attention_head_dim": [2, 4]}, V_PREDICTION),
    "SDXL": (StableDiffusionXL, SDXL_CONFIG, None),
    "PixArt-alpha": (
        PixArt,
        {**PIXART, "num_attention_heads": 3, "cross_attention_dim": 24, "sample_size": 128, "use_additional_conditions": True},
        None,
    ),
    "PixArt-Sigma": (PixArt, PIXART, None),
}


def decoder_of(name: str, scheduler: dict[str, Any] | None = None) -> Any:
    """With weights large enough that a wrong position, size or guidance shows, and a pooled vector."""
    kind, config, own = DECODERS[name]
    torch.manual_seed(0)
    decoder: Any = kind.from_config(config).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
    if hasattr(decoder, "pooled"):
        decoder.pooled.normal_()
    decoder.scheduler = scheduler or own
    return decoder


def texts() -> list[Tensor]:
    """Conditions without and with a prompt, ``[2, 5, 10]`` each."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 5, 10, generator=generator) for _ in range(2)]


def noise_of(decoder: Any, height: int = 8, width: int = 4) -> Tensor:
    return torch.randn(2, decoder.latent_channels, height, width, generator=torch.Generator().manual_seed(3))


def pipeline_latents(decoder: Any, noise: Tensor, texts: list[Tensor], steps: int, guidance: float, **settings: Any) -> Tensor:
    """Latents of the library's pipeline around the same network, with the scheduler of the same settings."""
    config = dict(decoder.scheduler or decoder.release_scheduler)
    scheduler = getattr(diffusers.schedulers, config["_class_name"]).from_config(config)
    height, width = (side * 2 for side in noise.shape[-2:])  # the codec of a pipeline says the size in pixels; factor 2
    given = {"latents": noise.clone(), "num_inference_steps": steps, "output_type": "latent", "height": height, "width": width}
    call = _CALLS[type(decoder)]
    with torch.no_grad():
        return call(decoder, scheduler, given | settings, texts, guidance)


def tiny_codec(channels: int) -> Any:
    return diffusers.AutoencoderKL(**codec(channels))


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unet(decoder: Any, scheduler: Any, given: dict[str, Any], texts: list[Tensor], guidance: float) -> Tensor:
    pipeline = diffusers.StableDiffusionPipeline(
        tiny_codec(4), None, None, decoder.model, scheduler, None, None, requires_safety_checker=False
    )
    prompts = {"prompt_embeds": texts[1], "negative_prompt_embeds": texts[0]}
    return _quiet(pipeline)(**given, **prompts, guidance_scale=guidance).images


def _sdxl(decoder: Any, scheduler: Any, given: dict[str, Any], texts: list[Tensor], guidance: float) -> Tensor:
    pipeline = diffusers.StableDiffusionXLPipeline(
        tiny_codec(4), None, None, None, None, decoder.model, scheduler, add_watermarker=False
    )
    pooled = decoder.pooled.expand(2, -1)
    prompts = {"prompt_embeds": texts[1], "negative_prompt_embeds": texts[0]}
    prompts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    return _quiet(pipeline)(**given, **prompts, guidance_scale=guidance).images


def _pixart(decoder: Any, scheduler: Any, given: dict[str, Any], texts: list[Tensor], guidance: float) -> Tensor:
    kind = diffusers.PixArtAlphaPipeline if decoder.model.use_additional_conditions else diffusers.PixArtSigmaPipeline
    pipeline = kind(None, None, tiny_codec(4), decoder.model, scheduler)
    ones = torch.ones(texts[0].shape[:2])
    prompts = {"prompt_embeds": texts[1], "negative_prompt_embeds": texts[0], "negative_prompt": None}
    prompts |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return _quiet(pipeline)(**given, **prompts, guidance_scale=guidance, use_resolution_binning=False).images


def _flux(decoder: Any, scheduler: Any, given: dict[str, Any], texts: list[Tensor], guidance: float) -> Tensor:
    pipeline = diffusers.FluxPipeline(scheduler, tiny_codec(4), None, None, None, None, decoder.model)
    noise = given["latents"]
    pooled = decoder.pooled.expand(2, -1)
    prompts = {"prompt_embeds": texts[1], "negative_prompt_embeds": texts[0]}
    prompts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    given["latents"] = pipeline._pack_latents(noise, *noise.shape)
    out = _quiet(pipeline)(**given, **prompts, guidance_scale=decoder.guidance, true_cfg_scale=guidance).images
    return pipeline._unpack_latents(out, given["height"], given["width"], pipeline.vae_scale_factor)


_CALLS: dict[type, Callable[..., Tensor]] = {Flux: _flux, StableDiffusion: _unet, StableDiffusionXL: _sdxl, PixArt: _pixart}
