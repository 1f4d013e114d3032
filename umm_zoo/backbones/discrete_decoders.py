"""Decoders of diffusion on discrete steps, through diffusers: the U-Nets of Stable Diffusion, and PixArt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffusers.models import PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from umm_zoo.backbones.diffusers_decoder import DiscreteDecoder, SizedDecoder
from umm_zoo.backbones.pooled import PooledDecoder
from umm_zoo.backbones.weight_files import stored_file
from umm_zoo.objectives.discrete import DiscreteSchedule
from umm_zoo.objectives.schedules import ReleaseSchedule


class StableDiffusion(DiscreteDecoder):
    """The U-Net of Stable Diffusion 1.x and 2.x (Rombach et al., 2022, arXiv 2112.10752): noise or v under cross-attention.

    The condition enters by cross-attention alone, 77 tokens of width 768 in 1.5 and 1024 in 2.1, any number here. 1.5 predicts the
    noise; 2.1 at 768 px predicts v, as the ``prediction_type`` of its folder's scheduler says. Latents have 4 channels at factor 8,
    of any size (``KLCodec`` with scaling 0.18215).

    Args:
        model: the library's network.

    Raises:
        ValueError: a network that takes more than latent, step and text, such as SDXL's, one of inpainting or of LCM.
    """

    kind = UNet2DConditionModel
    condition_rms = 1.0  #: our choice: CLIP's last states behind its final norm, about 1 by default weights of the norm
    release_scheduler = DiscreteSchedule.first

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        config: Any = model.config
        self.assert_fit(config)
        self.model = model
        self.condition_dim, self.latent_channels = _widths(config)[0], config.in_channels

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``."""
        if config["addition_embed_type"] == "text_time":
            hint = "umm_zoo.backbones.discrete_decoders.StableDiffusionXL reads that one"
            raise ValueError(f"StableDiffusion: found a network that is told sizes (SDXL), expected one without; {hint}")
        super().assert_fit(config)
        _assert_plain(cls.__name__, config, "addition_embed_type")

    @property
    def schedule(self) -> ReleaseSchedule:
        """See ``ImageDecoder``; the library's pipeline mends two settings of old folders."""
        return DiscreteSchedule(self.scheduler or self.release_scheduler, {"steps_offset": 1, "clip_sample": False})

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The library's forward."""
        predicted: Tensor = self.model(noisy, time, values, encoder_attention_mask=mask, return_dict=False)[0]
        return predicted


class StableDiffusionXL(PooledDecoder, SizedDecoder):
    """The U-Net of SDXL (Podell et al., 2023, arXiv 2307.01952): also told a vector of the text, the image's size and its cut.

    Tokens of width 2048, a pooled vector of width 1280 (``PooledDecoder``), latents of 4 channels at factor 8 (``KLCodec`` with
    scaling 0.13025). Size and cut (its section 2.2) are the loader's in training, see ``SizedDecoder``.

    Args:
        model: the library's network.
        pooled: ``[width]``, the constant; None is zeros, which is what the library's pipeline takes for an empty negative prompt.

    Raises:
        ValueError: a network that takes less (``StableDiffusion``) or more, such as SDXL's refiner or one of inpainting.
    """

    kind = UNet2DConditionModel
    condition_rms = 1.0  #: our choice: no published number is known
    pooled_parts = (("_2", True),)
    release_scheduler: ClassVar[dict[str, Any]] = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
    }

    def __init__(self, model: UNet2DConditionModel, pooled: Tensor | None = None) -> None:
        config: Any = model.config
        self.assert_fit(config)
        super().__init__(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim, pooled)
        self.model = model
        self.condition_dim, self.latent_channels = _widths(config)[0], config.in_channels

    @classmethod
    def look(cls, source: str, subfolder: str | None, config: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """See ``DiffusersNetwork``; the pipeline of a refiner says so."""
        filled = super().look(source, subfolder, config)
        whole = Path(source) if subfolder else Path(source).resolve().parent
        if (stored_file(whole, None, "model_index.json") or {}).get("requires_aesthetics_score"):
            raise ValueError(f"{source}: {_REFINER}")
        return filled

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``."""
        if config["addition_embed_type"] != "text_time":
            hint = "umm_zoo.backbones.discrete_decoders.StableDiffusion reads that one"
            found = f"addition_embed_type {config['addition_embed_type']!r}"
            raise ValueError(f"StableDiffusionXL: found a network with {found}, expected 'text_time'; {hint}")
        # alone, its five numbers of size, cut and beauty cannot be told from the base's six by shapes
        if (config["projection_class_embeddings_input_dim"], _widths(config)) == (2560, [1280]):
            raise ValueError(f"{cls.__name__}: {_REFINER}")
        super().assert_fit(config)
        _assert_plain(cls.__name__, config)

    def predict_sized(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None, sizes: Tensor) -> Tensor:
        """The library's forward."""
        told = {"text_embeds": self.pooled_for(noisy), "time_ids": sizes}
        predicted: Tensor = self.model(noisy, time, values, encoder_attention_mask=mask, added_cond_kwargs=told, return_dict=False)[
            0
        ]
        return predicted


class PixArt(SizedDecoder):
    """PixArt-alpha and -Sigma (Chen et al., 2023, arXiv 2310.00426; 2024, arXiv 2403.04692): a transformer that predicts noise.

    Tokens of T5 (width 4096, at most 120 and 300 in the releases) enter by cross-attention. The network predicts its variance
    too, the second half of its channels, which the library's pipelines leave aside, and so does ``predict``. PixArt-alpha at
    1024 px is told the height and width of the original and the ratio of what is made, see ``SizedDecoder``.

    The codec is Stable Diffusion 1.5's for alpha, SDXL's for Sigma.

    Args:
        model: the library's network.
    """

    kind = PixArtTransformer2DModel
    legacy_names = ("Transformer2DModel",)  #: as files of before 0.29 call it
    condition_rms = 1.0  #: our choice: no published number is known
    release_scheduler: ClassVar[dict[str, Any]] = {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    }

    def __init__(self, model: PixArtTransformer2DModel) -> None:
        super().__init__()
        config: Any = model.config
        self.assert_fit(config)
        self.model = model
        self.condition_dim = config.caption_channels or config.cross_attention_dim
        self.latent_channels, self.patch = config.in_channels, config.patch_size

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``; the variance makes twice as many channels."""
        if config["out_channels"] != 2 * config["in_channels"]:
            super().assert_fit(config)
        if config["norm_type"] != "ada_norm_single":
            raise ValueError(f"PixArt: found norm_type '{config['norm_type']}' (DiT and others), expected 'ada_norm_single'")

    def predict_sized(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None, sizes: Tensor) -> Tensor:
        """The library's forward; the mean alone."""
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            told = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 4:5] / sizes[:, 5:6]}
        predicted: Tensor = self.model(
            noisy,
            encoder_hidden_states=values,
            timestep=time,
            added_cond_kwargs=told,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return predicted[:, : self.latent_channels]


_REFINER = "found SDXL's refiner, which is also told how beautiful the image is to be, expected the base"


def _widths(config: Mapping[str, Any]) -> list[int]:
    """The widths of the condition in the blocks of a U-Net."""
    width = config["cross_attention_dim"]
    return [width] if isinstance(width, int) else sorted(set(width))


def _assert_plain(name: str, config: Mapping[str, Any], *also: str) -> None:
    """Refuse a U-Net that takes more than latent, step and a condition of one width.

    Raises:
        ValueError: it does.
    """
    for key in ("class_embed_type", "encoder_hid_dim", "time_cond_proj_dim", "num_class_embeds", *also):
        if config[key] is not None:
            raise ValueError(f"{name}: found {key} {config[key]!r}, expected a network of latent, step and text")
    if len(_widths(config)) != 1:
        raise ValueError(f"{name}: found cross_attention_dim {list(config['cross_attention_dim'])}, expected one width")
