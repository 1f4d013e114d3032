"""FLUX.1 and FLUX.2 through diffusers, and how their kind packs latents and moves padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers.models import Flux2Transformer2DModel, FluxTransformer2DModel
from torch import Tensor

from umm_zoo.backbones.by_shape import by_shape
from umm_zoo.backbones.diffusers_decoder import DiffusersDecoder
from umm_zoo.backbones.pooled import PooledDecoder
from umm_zoo.errors import Weight
from umm_zoo.objectives.schedules import EvenLibrarySchedule, Flux2Schedule


class Flux(PooledDecoder):
    """FLUX.1, dev and schnell (Black Forest Labs, 2024): text tokens and packed latents in one attention.

    Latents of 16 channels at factor 8 (``KLCodec`` with scaling 0.3611 and shift 0.1159) are packed in 2 x 2 cells per token; text
    tokens of width 4096 have no positions; padding is masked, where the library's pipeline shows it to the network. A pooled
    vector of width 768 comes from CLIP-L (``PooledDecoder``).

    Dev was distilled to contain its guidance: it is told a scale, in training too. Classifier-free guidance works beside it (the
    pipeline's ``true_cfg_scale``) and is not needed; schnell knows neither.

    Args:
        model: the library's network.
        pooled: ``[pooled_projection_dim]``, the constant; None is zeros.
        guidance: the scale that dev is told; 3.5 in its pipeline and in the library's training scripts.

    Raises:
        ValueError: a network that also takes an image (Fill, Depth, Canny).
    """

    kind = FluxTransformer2DModel
    condition_rms = 1.0  #: our choice: no published number is known
    pooled_parts = (("", False),)
    relatives = "FLUX.1-Fill, Depth or Canny"
    schedule_kind = EvenLibrarySchedule
    release_scheduler: ClassVar[dict[str, Any]] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
    }
    patch = 2
    sample_size = 128  #: of the pipeline

    def __init__(self, model: FluxTransformer2DModel, pooled: Tensor | None = None, guidance: Weight = 3.5) -> None:
        config: Any = model.config
        self.assert_fit(config)
        super().__init__(config.pooled_projection_dim, pooled)
        self.model, self.guidance = model, guidance
        self.condition_dim, self.latent_channels = config.joint_attention_dim, config.in_channels // 4

    @classmethod
    def from_config(
        cls, config: dict[str, Any], dtype: str = "float32", gradient_checkpointing: bool = False, guidance: Weight = 3.5
    ) -> Self:
        """As ``DiffusersNetwork.from_config``; ``guidance`` as in the class."""
        decoder = super().from_config(config, dtype, gradient_checkpointing)
        decoder.guidance = guidance
        return decoder

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        variant: str | None = None,
        quantization: dict[str, Any] | None = None,
        pooled_from: str | Path | None = None,
        guidance: Weight = 3.5,
    ) -> Self:
        """As ``PooledDecoder.from_pretrained``; ``guidance`` as in the class."""
        stated = (config, subfolder, dtype, gradient_checkpointing, variant, quantization)
        decoder = super().from_pretrained(source, *stated, pooled_from)
        decoder.guidance = guidance
        return decoder

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The library's forward, as its pipeline calls it."""
        tokens, grid = self.as_tokens(noisy)
        places = _places(noisy.device, (1, *grid), noisy.dtype)
        predicted: Tensor = self.model(
            hidden_states=tokens,
            encoder_hidden_states=values,
            pooled_projections=self.pooled_for(noisy),
            timestep=time * (self.num_train_times / 1000),  # the network multiplies by 1000
            img_ids=places,
            txt_ids=places.new_zeros(values.shape[1], 3),
            guidance=time.new_full(time.shape, self.guidance) if self.model.config.guidance_embeds else None,
            joint_attention_kwargs=joint_mask(mask, tokens),
            return_dict=False,
        )[0]
        return self.as_latents(predicted, grid)

    @staticmethod
    def as_tokens(latents: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The network's tokens of latents, and their grid."""
        return packed(latents)

    @staticmethod
    def as_latents(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents of the network's tokens."""
        return unpacked(tokens, grid)


class FluxOnFeatures(Flux):
    """FLUX.1's network, untrained, over a grid of image features ``[B, D, h, w]`` in the place of latents: a token per cell.

    What Forge-and-Quench's head is like ("Flux-style"); its sizes are in its weights, which we have not seen. The pooled vector
    stays zero.

    Reference: "Forge-and-Quench" (arXiv 2601.04706) and its released code.

    Args:
        model: the library's network; ``in_channels`` is D.
    """

    patch = 1

    def __init__(self, model: FluxTransformer2DModel, pooled: Tensor | None = None, guidance: Weight = 1.0) -> None:
        super().__init__(model, pooled, guidance)
        config: Any = model.config
        self.latent_channels = config.in_channels

    @staticmethod
    def as_tokens(latents: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """See ``Flux``."""
        return latents.flatten(2).transpose(1, 2), (latents.shape[2], latents.shape[3])

    @staticmethod
    def as_latents(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Flux``."""
        return tokens.transpose(1, 2).unflatten(2, grid)


class Flux2(DiffusersDecoder):
    """FLUX.2, dev and klein (Black Forest Labs, 2025): as FLUX.1 without a pooled vector, over a codec whose cells are larger.

    Latents of 128 channels at factor 16 (``Flux2Codec``) are a token per cell. Text tokens, of width 15360 in dev (three layers of
    its language model side by side), have positions: padding is moved behind them, and masked. Dev is told its guidance like
    FLUX.1's; klein is not.

    Args:
        model: the library's network.
        guidance: the scale that dev is told; 4.0 in its pipeline.
    """

    kind = Flux2Transformer2DModel
    condition_rms = 1.0  #: our choice: no published number is known
    schedule_kind = Flux2Schedule
    release_scheduler: ClassVar[dict[str, Any]] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 3.0,
        "use_dynamic_shifting": True,
    }
    pixels_per_cell = 16
    sample_size = 64  #: of the pipeline

    def __init__(self, model: Flux2Transformer2DModel, guidance: Weight = 4.0) -> None:
        super().__init__()
        config: Any = model.config
        self.assert_fit(config)
        self.model, self.guidance = model, guidance
        self.condition_dim, self.latent_channels = config.joint_attention_dim, config.in_channels

    @classmethod
    def from_config(
        cls, config: dict[str, Any], dtype: str = "float32", gradient_checkpointing: bool = False, guidance: Weight = 4.0
    ) -> Self:
        """As ``DiffusersNetwork.from_config``; ``guidance`` as in the class."""
        decoder = super().from_config(config, dtype, gradient_checkpointing)
        decoder.guidance = guidance
        return decoder

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        variant: str | None = None,
        quantization: dict[str, Any] | None = None,
        guidance: Weight = 4.0,
    ) -> Self:
        """As ``DiffusersDecoder.from_pretrained``; ``guidance`` as in the class."""
        decoder = super().from_pretrained(source, config, subfolder, dtype, gradient_checkpointing, variant, quantization)
        decoder.guidance = guidance
        return decoder

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The library's forward, as its pipeline calls it."""
        values, mask = left_aligned(values, mask)
        tokens, grid = noisy.flatten(2).transpose(1, 2), (noisy.shape[2], noisy.shape[3])
        predicted: Tensor = self.model(
            hidden_states=tokens,
            encoder_hidden_states=values,
            timestep=time * (self.num_train_times / 1000),  # the network multiplies by 1000
            img_ids=_places(noisy.device, (1, *grid, 1), noisy.dtype),
            txt_ids=_places(noisy.device, (1, 1, 1, values.shape[1]), noisy.dtype),
            guidance=time.new_full(time.shape, self.guidance),
            joint_attention_kwargs=joint_mask(mask, tokens),
            return_dict=False,
        )[0]
        return predicted.transpose(1, 2).unflatten(2, grid)


def left_aligned(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens in their order with the padding behind them, for networks that count positions from the left."""
    if mask is None:
        return values, None
    order = torch.argsort(~mask, dim=1, stable=True)
    return values.gather(1, order[..., None].expand_as(values)), mask.gather(1, order)


@by_shape
def _places(counts: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """All places of a box, ``[product, axes]``, the last axis fastest."""
    return torch.cartesian_prod(*map(torch.arange, counts)).to(dtype)


def packed(latents: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Tokens of 2 x 2 cells, ``[B, h/2 * w/2, 4 C]``, channel before place, and their grid."""
    cells = F.pixel_unshuffle(latents, 2)
    return cells.flatten(2).transpose(1, 2), (cells.shape[2], cells.shape[3])


def unpacked(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The latents of ``packed`` tokens, ``[B, C, h, w]``."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2)


def joint_mask(mask: Tensor | None, image: Tensor) -> dict[str, Tensor] | None:
    """What a joint attention over text and then image tokens must be told of padding, ``[B, 1, 1, N + h*w]``."""
    return None if mask is None else {"attention_mask": F.pad(mask, (0, image.shape[1]), value=True)[:, None, None]}
