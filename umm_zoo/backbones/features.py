"""Pretrained image encoders behind one interface, for rewards, reconstruction targets, metrics and language models.

Normalisation and resizing live inside: every encoder takes the images of a batch, in [-1, 1] and of any size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.clip import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.dinov2 import Dinov2Config, Dinov2Model
from transformers.models.dinov3_vit import DINOv3ViTConfig, DINOv3ViTModel
from transformers.models.siglip import SiglipConfig, SiglipModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from transformers.utils.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from transformers.utils.constants import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.utils.constants import OPENAI_CLIP_MEAN as CLIP_MEAN
from transformers.utils.constants import OPENAI_CLIP_STD as CLIP_STD

from umm_zoo.backbones.loading import assert_known, find_source, load_checkpoint, on_meta_device, torch_dtype
from umm_zoo.backbones.text_encoding import TextEncoding
from umm_zoo.backbones.tokenizer import tokenizer_source
from umm_zoo.batch import Grid

Attention = Literal["eager", "sdpa", "flash_attention_2"]


def resize_to(images: Tensor, size: int, crop_from: int | None, mode: str = "bicubic") -> Tensor:
    """Square images of ``size``, as the stock image processors make them (antialiased).

    Args:
        images: ``[B, 3, H, W]``; returned as they are where they already have the size.
        size: side of the result in pixels.
        crop_from: length the shorter side gets before the centre is cut out; None squeezes the whole image into the square.
        mode: ``bicubic`` or ``bilinear``.

    Shape:
        - output: ``[B, 3, size, size]``
    """
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    if crop_from is None:
        target = (size, size)
    else:
        short = min(height, width)
        target = (int(crop_from * height / short), int(crop_from * width / short))
    resized = F.interpolate(images.float(), size=target, mode=mode, antialias=True, align_corners=False)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return resized[..., top : top + size, left : left + size].clamp(-1, 1).to(images.dtype)


class FeatureEncoder(nn.Module, ABC):
    """A pretrained image encoder.

    Shape:
        - forward: ``[B, 3, H, W]`` in [-1, 1] to ``[B, F]``, one vector per image
        - tokens: the same images to ``[B, N, D]``, patch tokens in raster order, without class and register tokens

    Attributes:
        width: F.
        token_width: D.
        num_layers: number of transformer blocks.
        grid: the patch grid, N = h * w.
        image_size: side of the square images the network itself sees, in pixels.
    """

    width: int
    token_width: int
    num_layers: int
    grid: Grid
    image_size: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """One vector per image, ``[B, F]``, not normalised."""

    @abstractmethod
    def tokens(self, images: Tensor, layer: int = -1) -> Tensor:
        """Patch tokens ``[B, N, D]``: -1 is what the network gives out, -2 the input of its last block (LLaVA's choice)."""


class LibraryEncoder(FeatureEncoder):
    """An encoder of the transformers library.

    Args:
        model: the library's network.
        image_size: side of the square images it sees; None takes ``stock_size``, or the config's where that is smaller.

    Raises:
        ValueError: ``image_size`` is smaller than a patch.
    """

    kind: ClassVar[type[PreTrainedModel]]
    config_kind: ClassVar[type[Any]]
    mean: ClassVar[Sequence[float]]
    std: ClassVar[Sequence[float]]
    interpolation: ClassVar[str] = "bicubic"
    stock_size: ClassVar[int | None] = None  #: of the stock processor, where it differs from the config's
    crop_ratio: ClassVar[float | None] = 1.0  #: shorter side before the crop over the crop; None squeezes without a crop
    optional: ClassVar[Collection[str]] = ()  #: prefixes of weights that public files hold and this class leaves out
    model: Any

    def __init__(self, model: PreTrainedModel, image_size: int | None = None) -> None:
        super().__init__()
        self.model = model
        vision = getattr(model.config, "vision_config", model.config)
        size = image_size or min(vision.image_size, self.stock_size or vision.image_size)
        if size < vision.patch_size:
            raise ValueError(f"{type(self).__name__}.image_size: found {size}, expected {vision.patch_size} (a patch) or more")
        self.image_size = size  # what does not fill a patch is left out: SigLIP's 384 pixels are 27 patches of 14
        self.grid = Grid(size // vision.patch_size, size // vision.patch_size)
        self.token_width, self.num_layers = vision.hidden_size, vision.num_hidden_layers
        self.width = self.token_width

    @classmethod
    def from_config(
        cls, config: dict[str, Any], image_size: int | None = None, dtype: str = "float32", attention: Attention = "sdpa"
    ) -> Self:
        """Random weights.

        Args:
            config: the library's keys (``hidden_size``, ``patch_size`` …).
            image_size: see the class.
            dtype: of the weights.
            attention: the library's implementation.

        Raises:
            ValueError: a key is misspelt.
        """
        return cls(cls._build(config, dtype, attention), image_size)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: dict[str, Any] | None = None,
        image_size: int | None = None,
        dtype: str = "float32",
        attention: Attention = "sdpa",
    ) -> Self:
        """A folder in the library's format or a name on the hub. On the meta device with ``config`` given nothing is read.

        Args:
            source: folder or name.
            config: for the meta device.
            image_size, dtype, attention: see ``from_config``.

        Raises:
            ValueError: the weights do not fill the network exactly.
        """
        return cls(cls._load(source, config, dtype, attention), image_size)

    @classmethod
    def _build(cls, config: dict[str, Any], dtype: str, attention: Attention) -> PreTrainedModel:
        defaults, name = cls.config_kind().to_dict(), f"{cls.kind.__name__}.config"
        assert_known(name, config, set(defaults))
        for part in ("text_config", "vision_config"):
            if part in config:
                assert_known(f"{name}.{part}", config[part], set(defaults[part]))
        model: Any = cls.kind._from_config(cls.config_kind(**config), attn_implementation=attention)
        return cast(PreTrainedModel, model if dtype == "float32" else model.to(torch_dtype(dtype)))

    @classmethod
    def _load(cls, source: str | Path, config: dict[str, Any] | None, dtype: str, attention: Attention) -> PreTrainedModel:
        found = find_source(source)
        if not on_meta_device():
            model = load_checkpoint(cls.kind, found, dtype, cls.optional, attn_implementation=attention)
            return cast(PreTrainedModel, model)
        if config is None:  # the source's own, without its weights
            return cast(PreTrainedModel, cls.kind._from_config(cls.config_kind.from_pretrained(found)))
        return cls._build(config, dtype, attention)

    def forward(self, images: Tensor) -> Tensor:
        """The one vector of each image after the final norm."""
        return self.pooled(self.vision(self.pixels(images))).to(images.dtype)

    def pixels(self, images: Tensor) -> Tensor:
        """Resized and normalised as the network was trained, ``[B, 3, image_size, image_size]``."""
        crop_from = None if self.crop_ratio is None else round(self.image_size * self.crop_ratio)
        images = resize_to(images, self.image_size, crop_from, self.interpolation)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((images * 0.5 + 0.5 - mean) / std).to(self.model.dtype)

    def tokens(self, images: Tensor, layer: int = -1) -> Tensor:
        """Patch tokens of a layer.

        Raises:
            ValueError: there is no such layer.
        """
        if not -self.num_layers - 1 <= layer <= -1:
            raise ValueError(f"{type(self).__name__}.layer: found {layer}, expected {-self.num_layers - 1} to -1")
        output = self.vision(self.pixels(images), output_hidden_states=layer != -1)
        return self.patches(output, layer).to(images.dtype)

    def patches(self, output: Any, layer: int) -> Tensor:
        """Patch tokens ``[B, N, D]`` of a layer of what ``vision`` gave; class and register tokens come first and are left out."""
        state: Tensor = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return state[:, -self.grid.num_cells :]

    def pooled(self, output: Any) -> Tensor:
        """The one vector ``[B, token_width]`` of what ``vision`` gave, after the final norm."""
        vector: Tensor = output.pooler_output
        return vector

    def vision(self, pixels: Tensor, output_hidden_states: bool = False, masked: Tensor | None = None) -> Any:
        """The library's output for normalised pixels; ``masked`` [B, N] puts the mask token there, where the network has one."""
        mask = {} if masked is None else {"bool_masked_pos": masked}
        tower = getattr(self.model, "vision_model", self.model)
        return tower(pixel_values=pixels, output_hidden_states=output_hidden_states, **mask)

    def save(self, folder: str | Path) -> None:
        """transformers' format: ``config.json`` and ``model.safetensors``."""
        self.model.save_pretrained(folder)


class CLIPVisionFeatures(LibraryEncoder):
    """The image tower of CLIP alone (Radford et al., 2021, arXiv 2103.00020): what LLaVA and ROSS look through.

    ``forward`` gives the class token after the final norm. A file of the whole CLIP loads too, its text side being left out.
    """

    kind, config_kind = CLIPVisionModel, CLIPVisionConfig
    mean, std = CLIP_MEAN, CLIP_STD
    optional = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


class DINOv2Features(LibraryEncoder):
    """A self-supervised encoder (Oquab et al., 2023, arXiv 2304.07193); ``forward`` gives the class token after the final norm.

    The stock processor brings the shorter side to 256 and cuts out 224.
    """

    kind: ClassVar[type[PreTrainedModel]] = Dinov2Model
    config_kind: ClassVar[type[Any]] = Dinov2Config
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    stock_size = 224
    crop_ratio: ClassVar[float | None] = 256 / 224


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
        text: turns strings into token ids the way the text tower wants them.
        image_size: see ``LibraryEncoder``.
    """

    causal_text: ClassVar[bool] = False  #: what follows the end token cannot reach it, so it need not be computed

    def __init__(self, model: PreTrainedModel, text: TextEncoding, image_size: int | None = None) -> None:
        super().__init__(model, image_size)
        self.text = text
        text.assert_fits(model.config.text_config)

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        image_size: int | None = None,
        dtype: str = "float32",
        attention: Attention = "sdpa",
        tokenizer: str | None = None,
    ) -> Self:
        """Random weights; vocabulary size and special tokens come from the tokenizer where the config does not give them.

        Args:
            config: the library's keys, with ``text_config`` and ``vision_config`` inside.
            image_size, dtype, attention: see ``LibraryEncoder.from_config``.
            tokenizer: name or folder; None is the shipped one.
        """
        text = TextEncoding.load(tokenizer)
        config = {**config, "text_config": {**text.config(), **config.get("text_config", {})}}
        return cls(cls._build(config, dtype, attention), text, image_size)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: dict[str, Any] | None = None,
        image_size: int | None = None,
        dtype: str = "float32",
        attention: Attention = "sdpa",
        tokenizer: str | None = None,
    ) -> Self:
        """As ``LibraryEncoder.from_pretrained``.

        Args:
            source, config, image_size, dtype, attention: see there.
            tokenizer: name or folder; None is the one inside ``source``, or the shipped one where a folder holds none.

        Raises:
            ValueError: the weights do not fill the network exactly, or the tokenizer is not the text tower's.
        """
        if config is not None and on_meta_device():
            return cls.from_config(config, image_size, dtype, attention, tokenizer)
        text = TextEncoding.load(tokenizer_source(find_source(source), tokenizer))
        return cls(cls._load(source, config, dtype, attention), text, image_size)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Texts in the space of ``forward``, ``[len(texts), F]``, not normalised."""
        ids = self.text(texts, self.model.config.text_config.max_position_embeddings, self.causal_text)
        # transformers 5 gives an output object here, older versions a tensor
        pooled: Tensor = self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """The image in the space it shares with the texts."""
        pooled: Tensor = self.model.get_image_features(pixel_values=self.pixels(images)).pooler_output
        return pooled.to(images.dtype)


class CLIPFeatures(TextImageEncoder):
    """CLIP with both towers (Radford et al., 2021, arXiv 2103.00020): UAE's reward and the first column of its Unified-Score."""

    kind, config_kind = CLIPModel, CLIPConfig
    mean, std = CLIP_MEAN, CLIP_STD
    causal_text = True

    def __init__(self, model: PreTrainedModel, text: TextEncoding, image_size: int | None = None) -> None:
        super().__init__(model, text, image_size)
        self.width = int(self.model.config.projection_dim)


class SigLIPFeatures(TextImageEncoder):
    """SigLIP with both towers (Zhai et al., 2023, arXiv 2303.15343); images are squeezed to the square, not cropped.

    There is no class token: ``forward`` gives the attention-pooled vector. Texts are padded to the full length without a mask, as
    in its training.
    """

    kind, config_kind = SiglipModel, SiglipConfig
    mean, std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    crop_ratio = None

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        image_size: int | None = None,
        dtype: str = "float32",
        attention: Attention = "sdpa",
        tokenizer: str | None = None,
    ) -> Self:
        """As the base class; the logits start at scale 10 and bias -10 (section 3.2), where the library leaves 1 and 0."""
        encoder = super().from_config(config, image_size, dtype, attention, tokenizer)
        with torch.no_grad():
            encoder.model.logit_scale.fill_(math.log(10.0))
            encoder.model.logit_bias.fill_(-10.0)
        return encoder
