"""Pretrained image encoders, for rewards, reconstruction targets, metrics and language models."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.clip import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.dinov2 import Dinov2Config, Dinov2Model
from transformers.models.dinov3_vit import DINOv3ViTConfig, DINOv3ViTModel
from transformers.models.siglip import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from umm_zoo.backbones.feature_encoder import LibraryEncoder
from umm_zoo.backbones.loading import find_source, on_meta_device
from umm_zoo.backbones.tokenizer import TextEncoding, tokenizer_source
from umm_zoo.errors import Count


class CLIPVisionFeatures(LibraryEncoder):
    """The image tower of CLIP alone (Radford et al., 2021, arXiv 2103.00020): what LLaVA and ROSS look through.

    ``forward`` gives the class token after the final norm. A file of the whole CLIP loads too, its text side being left out.
    """

    kind, config_kind = CLIPVisionModel, CLIPVisionConfig
    mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    optional = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


class SigLIPVisionFeatures(LibraryEncoder):
    """The image tower of SigLIP alone (Zhai et al., 2023, arXiv 2303.15343); images are squeezed to the square, not cropped.

    ``forward`` gives the attention-pooled vector. A file of the whole SigLIP loads too, its text side being left out.
    """

    kind, config_kind = SiglipVisionModel, SiglipVisionConfig
    mean, std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    crop_ratio = None
    optional = ("text_model.", "logit_scale", "logit_bias")


class DINOv2Features(LibraryEncoder):
    """A self-supervised encoder (Oquab et al., 2023, arXiv 2304.07193); ``forward`` gives the class token after the final norm.

    The stock processor brings the shorter side to 256 and cuts out 224, of images of 224 px too.
    """

    kind: ClassVar[type[PreTrainedModel]] = Dinov2Model
    config_kind: ClassVar[type[Any]] = Dinov2Config
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    stock_size = 224
    crop_ratio: float | None = 256 / 224
    stretches = MappingProxyType({})  # the library's network always does


class DINOv3Features(DINOv2Features):
    """DINOv2's successor (Siméoni et al., 2025, arXiv 2508.10104): rotary positions and register tokens.

    The stock processor squeezes the image to 224 x 224, bilinearly.
    """

    kind, config_kind = DINOv3ViTModel, DINOv3ViTConfig
    interpolation, crop_ratio = "bilinear", None


class TextImageEncoder(LibraryEncoder):
    """An image encoder with a text tower in the same space.

    Args:
        model: the library's network.
        image_size: see ``LibraryEncoder``.
        text: strings to the token ids of the text tower; None is by the shipped tokenizer.
    """

    causal_text: ClassVar[bool] = False  #: what follows the end token cannot reach it, so it need not be computed

    def __init__(self, model: PreTrainedModel, image_size: Count | None = None, text: TextEncoding | None = None) -> None:
        super().__init__(model, image_size)
        self.text = text or TextEncoding()
        self.text.assert_fits(model.config.text_config)
        self.width = getattr(model.config, "projection_dim", self.token_width)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, config: dict[str, Any] | None = None, image_size: Count | None = None, dtype: str = "float32"
    ) -> Self:
        """As ``LibraryEncoder.from_pretrained``; the tokenizer is that inside ``source``, or the shipped one where it holds none.

        Raises:
            ValueError: the weights do not fill the network exactly, or the tokenizer is not the text tower's.
        """
        found = find_source(source, cls.kind)
        if config is not None and on_meta_device():
            return cls.from_config(config, image_size, dtype)
        text = TextEncoding(tokenizer_source(found))
        return cls._processed(source, config, dtype, image_size, text=text)

    @classmethod
    def _build(cls, config: dict[str, Any], dtype: str) -> PreTrainedModel:
        """Vocabulary size and special tokens come from the shipped tokenizer where the config does not give them."""
        tokens = TextEncoding().config()
        return super()._build({**config, "text_config": {**tokens, **config.get("text_config", {})}}, dtype)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Texts in the space of ``forward``, ``[len(texts), F]``, not normalised."""
        ids = self.text(texts, self.model.config.text_config.max_position_embeddings, self.causal_text)
        # transformers 5 gives an output object here, older versions a tensor
        pooled: Tensor = self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output
        return pooled

    def vector(self, output: Any) -> Tensor:
        """The image in the space it shares with the texts: projected, where the library projects."""
        projected: Tensor = getattr(self.model, "visual_projection", nn.Identity())(self.pooled(output))
        return projected


class CLIPFeatures(TextImageEncoder):
    """CLIP with both towers (Radford et al., 2021, arXiv 2103.00020): UAE's reward and the first column of its Unified-Score."""

    kind, config_kind = CLIPModel, CLIPConfig
    mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    causal_text = True


class SigLIPFeatures(TextImageEncoder):
    """SigLIP with both towers (Zhai et al., 2023, arXiv 2303.15343); images are squeezed to the square, not cropped.

    There is no class token: ``forward`` gives the attention-pooled vector. Texts are padded to the full length without a mask, as
    in its training.
    """

    kind, config_kind = SiglipModel, SiglipConfig
    mean, std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    crop_ratio = None

    @classmethod
    def _build(cls, config: dict[str, Any], dtype: str) -> PreTrainedModel:
        """As the base class; the logits start at scale 10 and bias -10 (section 3.2), where the library leaves 1 and 0."""
        model: Any = super()._build(config, dtype)
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10.0))
            model.logit_bias.fill_(-10.0)
        return cast(PreTrainedModel, model)
