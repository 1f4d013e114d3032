"""Decoders of every family at toy size, and the library's own pipelines around the same networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import diffusers.schedulers
import torch
from torch import Tensor

from tests.backbones.test_release_sampling import SANA, SD3
from tests.backbones.test_release_sampling import pipeline_latents as release_latents
from tests.tiny_configs import codec
from umm_zoo.backbones.diffusers_decoder import DiffusersDecoder
from umm_zoo.backbones.discrete_decoders import PixArt, StableDiffusion, StableDiffusionXL
from umm_zoo.backbones.flow_decoders import Lumina2, QwenImage, ZImage
from umm_zoo.backbones.flux import Flux, Flux2
from umm_zoo.backbones.sana import Sana
from umm_zoo.backbones.sd3 import StableDiffusion3

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
FLUX2 = {
    **HEADS, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 10, "axes_dims_rope": [2, 2, 2, 2],
    "timestep_guidance_channels": 16,
}  # fmt: skip
LUMINA2 = {
    "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 3,
    "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": [4, 2, 2], "axes_lens": [80, 8, 8], "cap_feat_dim": 10,
}  # fmt: skip
ZIMAGE = {
    "in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 10,
    "axes_dims": [4, 2, 2], "axes_lens": [128, 8, 8],
}  # fmt: skip
QWEN = {**HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 1, "joint_attention_dim": 10, "axes_dims_rope": [4, 2, 2]}
V_PREDICTION = {**StableDiffusion.release_scheduler, "prediction_type": "v_prediction", "_class_name": "DDIMScheduler"}

#: By name: class, configuration, scheduler (None: that of the release).
DECODERS: dict[str, tuple[type[DiffusersDecoder], dict[str, Any], dict[str, Any] | None]] = {
    "Sana": (Sana, SANA, None),
    "SD 3": (StableDiffusion3, SD3, None),
    "FLUX.1 dev": (Flux, {**FLUX, "guidance_embeds": True}, None),
    "FLUX.1 schnell": (Flux, FLUX, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}),
    "FLUX.2 dev": (Flux2, {**FLUX2, "guidance_embeds": True}, None),
    "FLUX.2 klein": (Flux2, {**FLUX2, "guidance_embeds": False}, None),
    "Lumina 2": (Lumina2, LUMINA2, {**Lumina2.release_scheduler, "use_dynamic_shifting": True}),
    "Z-Image": (ZImage, ZIMAGE, {**ZImage.release_scheduler, "use_dynamic_shifting": True}),
    "Qwen-Image": (QwenImage, QWEN, None),
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
        torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
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


def _flux2(decoder: Any, scheduler: Any, given: dict[str, Any], texts: list[Tensor], guidance: float) -> Tensor:
    """Dev's pipeline knows no other guidance than what the network is told; klein's runs two branches."""
    vae, noise = diffusers.AutoencoderKLFlux2(**codec(2), batch_norm_eps=1e-4), given["latents"]
    given |= {"prompt_embeds": texts[1], "height": noise.shape[2] * 4, "width": noise.shape[3] * 4}
    if decoder.model.config.guidance_embeds:
        pipeline = diffusers.Flux2Pipeline(scheduler, vae, None, None, decoder.model)
        out = _quiet(pipeline)(**given, guidance_scale=decoder.guidance).images
        return out.transpose(1, 2).unflatten(2, noise.shape[2:])
    else:
        vae.bn.running_var.fill_(1 - 1e-4)  # it undoes what the codec has normed
        pipeline = diffusers.Flux2KleinPipeline(scheduler, vae, None, None, decoder.model)
        out = _quiet(pipeline)(**given, negative_prompt_embeds=texts[0], guidance_scale=guidance).images
    return torch.nn.functional.pixel_unshuffle(out, 2)


def _lumina2(decoder: Any, scheduler: Any, given: dict[str, Any], texts: list[Tensor], guidance: float) -> Tensor:
    pipeline = diffusers.Lumina2Pipeline(decoder.model, scheduler, tiny_codec(4), None, None)
    ones = torch.ones(texts[0].shape[:2], dtype=torch.bool)
    prompts = {"prompt_embeds": texts[1], "negative_prompt_embeds": texts[0], "height": 16, "width": 16}  # given latents decide
    prompts |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return _quiet(pipeline)(**(given | prompts), guidance_scale=guidance, cfg_normalization=False).images


def _z_image(decoder: Any, scheduler: Any, given: dict[str, Any], texts: list[Tensor], guidance: float) -> Tensor:
    pipeline = diffusers.ZImagePipeline(scheduler, tiny_codec(4), None, None, decoder.model)
    prompts = {"prompt_embeds": list(texts[1]), "negative_prompt_embeds": list(texts[0])}
    return _quiet(pipeline)(**given, **prompts, guidance_scale=guidance - 1).images


def _qwen_image(decoder: Any, scheduler: Any, given: dict[str, Any], texts: list[Tensor], guidance: float) -> Tensor:
    """Without guidance, which the pipeline scales in a way of its own."""
    assert guidance == 1
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1], temperal_downsample=[False], num_res_blocks=1)
    pipeline, noise = diffusers.QwenImagePipeline(scheduler, vae, None, None, decoder.model), given["latents"]
    given["latents"] = pipeline._pack_latents(noise, *noise.shape)
    mask = torch.ones(texts[0].shape[:2], dtype=torch.bool)
    out = _quiet(pipeline)(**given, prompt_embeds=texts[1], prompt_embeds_mask=mask, true_cfg_scale=1.0).images
    return pipeline._unpack_latents(out, given["height"], given["width"], pipeline.vae_scale_factor)[:, :, 0]


def _earlier(decoder: Any, scheduler: Any, given: dict[str, Any], texts: list[Tensor], guidance: float) -> Tensor:
    return release_latents(decoder, given["latents"], texts, given["num_inference_steps"], guidance)


_CALLS: dict[type, Callable[..., Tensor]] = {
    Sana: _earlier,
    StableDiffusion3: _earlier,
    Flux: _flux,
    Flux2: _flux2,
    Lumina2: _lumina2,
    ZImage: _z_image,
    QwenImage: _qwen_image,
    StableDiffusion: _unet,
    StableDiffusionXL: _sdxl,
    PixArt: _pixart,
}
#: Whose pipelines know classifier-free guidance as a weighted sum.
GUIDED = [name for name in DECODERS if name not in ("FLUX.2 dev", "Qwen-Image")]
