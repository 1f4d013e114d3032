"""Decoders that are flows, through diffusers: Lumina 2, Z-Image and Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models import Lumina2Transformer2DModel, QwenImageTransformer2DModel, ZImageTransformer2DModel
from torch import Tensor

from umm_zoo.backbones.diffusers_decoder import DiffusersDecoder
from umm_zoo.backbones.flux import left_aligned, packed, unpacked
from umm_zoo.batch import Grid
from umm_zoo.objectives.schedules import EvenLibrarySchedule, Lumina2Schedule, ReleaseSchedule


class Lumina2(DiffusersDecoder):
    """Lumina-Image 2.0 (Qin et al., 2025, arXiv 2503.21758): text and image tokens in one sequence, of one network.

    Tokens of Gemma-2-2B (width 2304) pass a norm first, so that their scale does not matter; at most 299 of them have positions.
    FLUX.1's codec, in patches of 2 x 2. The library's pipeline guides with the norm of the conditional prediction
    (``cfg_normalization``), which is not done here.

    Args:
        model: the library's network.
    """

    kind = Lumina2Transformer2DModel
    condition_rms = 1.0  #: the network norms its tokens
    release_scheduler: ClassVar[dict[str, Any]] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0}

    def __init__(self, model: Lumina2Transformer2DModel) -> None:
        super().__init__()
        config: Any = model.config
        self.assert_fit(config)
        self.model = model
        self.condition_dim, self.latent_channels, self.patch = config.cap_feat_dim, config.in_channels, config.patch_size

    @property
    def schedule(self) -> ReleaseSchedule:
        """See ``ImageDecoder``."""
        return Lumina2Schedule(self.scheduler or self.release_scheduler, self.patch, self.latent_channels)

    def takes(self, grid: Grid) -> bool:
        """See ``ImageDecoder``; the tables of positions have an edge."""
        edges = self.model.config.axes_lens[1:]
        return super().takes(grid) and all(side <= edge * self.patch for side, edge in zip(grid, edges, strict=True))

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The library's forward, whose time runs from noise to data, and its velocity too."""
        if values.shape[1] >= (most := self.model.config.axes_lens[0]):
            raise ValueError(f"Lumina2.condition: found {values.shape[1]} tokens, expected at most {most - 1}")
        values, mask = left_aligned(values, mask)
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if mask is None else mask
        predicted: Tensor = self.model(
            hidden_states=noisy,
            timestep=1 - time,
            encoder_hidden_states=values,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return -predicted


class ZImage(DiffusersDecoder):
    """Z-Image (Cai et al., 2025, arXiv 2511.22699): text and image tokens in one sequence of a single-stream transformer.

    Tokens of Qwen3-4B (width 2560) pass a norm first, so that their scale does not matter. FLUX.1's codec, in patches of 2 x 2.
    The library's pipeline counts its guidance from the conditional prediction: its scale s is 1 + s here.

    Args:
        model: the library's network.

    Raises:
        ValueError: a network that also takes features of images (Omni).
    """

    kind = ZImageTransformer2DModel
    condition_rms = 1.0  #: the network norms its tokens
    schedule_kind = EvenLibrarySchedule
    release_scheduler: ClassVar[dict[str, Any]] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    patch = 2
    sample_size = 128  #: of the pipeline

    def __init__(self, model: ZImageTransformer2DModel) -> None:
        super().__init__()
        config: Any = model.config
        self.assert_fit(config)
        self.model = model
        self.condition_dim, self.latent_channels = config.cap_feat_dim, config.in_channels

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``."""
        if config["siglip_feat_dim"] is not None or cls.patch not in config["all_patch_size"]:
            found = f"siglip_feat_dim {config['siglip_feat_dim']} and all_patch_size {list(config['all_patch_size'])}"
            raise ValueError(f"ZImage: found {found}, expected a network of text alone, in patches of {cls.patch}")

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The library's forward, whose time runs from noise to data, and its velocity too; rows are given one by one."""
        rows = [row if mask is None else row[own] for row, own in zip(values, values if mask is None else mask, strict=True)]
        moment = 1 - time * (self.num_train_times / 1000)  # the pipeline's thousand is fixed
        predicted = self.model(list(noisy[:, :, None]), moment, rows, patch_size=self.patch, return_dict=False)[0]
        return -torch.stack(list(predicted))[:, :, 0]


class QwenImage(DiffusersDecoder):
    """Qwen-Image (Wu et al., 2025, arXiv 2508.02324): text tokens and packed latents in one attention, like FLUX.1.

    Tokens of Qwen2.5-VL-7B (width 3584) pass a norm first, so that their scale does not matter; padding is moved behind them, and
    masked. Latents of 16 channels at factor 8 (``QwenImageCodec``) are packed in 2 x 2 cells per token. The library's pipeline
    guides with the norm of the conditional prediction, which is not done here.

    Args:
        model: the library's network.

    Raises:
        ValueError: a network that takes more (of layers or of editing).
    """

    kind = QwenImageTransformer2DModel
    condition_rms = 1.0  #: the network norms its tokens
    schedule_kind = EvenLibrarySchedule
    release_scheduler: ClassVar[dict[str, Any]] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    }
    patch = 2
    sample_size = 128  #: of the pipeline

    def __init__(self, model: QwenImageTransformer2DModel) -> None:
        super().__init__()
        config: Any = model.config
        self.assert_fit(config)
        self.model = model
        self.condition_dim, self.latent_channels = config.joint_attention_dim, config.in_channels // 4

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``; out come cells, in go 2 x 2 of them."""
        super().assert_fit({**config, "in_channels": config["in_channels"] // cls.patch**2})
        for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config[key]:
                raise ValueError(f"QwenImage: found a config with {key}, expected a network of text and latent alone")

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The library's forward, as its pipeline calls it."""
        values, mask = left_aligned(values, mask)
        tokens, grid = packed(noisy)
        predicted: Tensor = self.model(
            hidden_states=tokens,
            encoder_hidden_states=values,
            encoder_hidden_states_mask=mask,
            timestep=time * (self.num_train_times / 1000),  # the network multiplies by 1000
            img_shapes=[[(1, *grid)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpacked(predicted, grid)
