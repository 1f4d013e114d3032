"""Interface of pretrained image encoders, and what those of the transformers library share.

Normalisation and resizing live inside: every encoder takes the images of a batch, in [-1, 1] and of any size.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from umm_zoo.backbones.by_shape import constants
from umm_zoo.backbones.equals import distinct
from umm_zoo.backbones.loading import (
    assert_known,
    checked_config,
    find_source,
    image_processor_of,
    load_checkpoint,
    on_meta_device,
    torch_dtype,
)
from umm_zoo.backbones.precision import ExactBuffers, resize_to
from umm_zoo.backbones.quantization import assert_writable
from umm_zoo.backbones.stock_processor import stock_processor
from umm_zoo.batch import Grid, Images, map_by_size
from umm_zoo.errors import Count, UserError


class FeatureEncoder(ExactBuffers, ABC):
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

    def grid_of(self, height: int, width: int) -> Grid:
        """Patch grid of images of that size as they are; here of ``image_size`` alone.

        Raises:
            UserError: the network does not take them.
        """
        if (height, width) != (side := self.image_size, side):
            raise UserError("data.image_size", f"{height} x {width} px", f"{side} x {side} px, the one size of the encoder")
        return self.grid

    def as_they_are(self, images: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """As ``vector_and_tokens``, of images that are neither resized nor cut, see ``grid_of``."""
        self.grid_of(*images.shape[-2:])
        return self.vector_and_tokens(images, layers)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """One vector per image, ``[B, F]``, not normalised."""

    @abstractmethod
    def tokens(self, images: Tensor, layer: int = -1) -> Tensor:
        """Patch tokens ``[B, N, D]``: -1 is what the network gives out, -2 the input of its last block (LLaVA's choice)."""

    def tokens_of(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Patch tokens of several layers, see ``tokens``."""
        return [self.tokens(images, layer) for layer in layers]

    def vector_and_tokens(self, images: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The vector ``[B, F]`` of each image and its tokens ``[B, N, D]`` of several layers; see ``forward`` and ``tokens``."""
        return self(images), [self.tokens(images, layer) for layer in layers]

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """See ``outputs.TakesImages``."""
        self(inputs)


def features_of(encoder: FeatureEncoder, images: Images) -> Tensor:
    """Vectors ``[M, F]`` in float32 of M images of any sizes, which are clamped to [-1, 1]; the encoder runs once per size.

    One and the same tensor that is there several times is encoded once.
    """
    shown = list(images)
    firsts, places = distinct(map(id, shown))
    once = images if len(firsts) == len(shown) else [shown[first] for first in firsts]
    vectors = map_by_size(lambda stack: encoder(stack.clamp(-1, 1)).float(), once)
    return torch.stack([vectors[place] for place in places])


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
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str = "bicubic"
    stock_size: int | None = None  #: of the stock processor, where it differs from the config's
    crop_ratio: float | None = 1.0  #: shorter side before the crop over the crop; None squeezes without a crop
    stretches: ClassVar[Mapping[str, Any]] = MappingProxyType({"interpolate_pos_encoding": True})  #: for a grid of another size
    optional: ClassVar[Collection[str]] = ()  #: prefixes of weights that public files hold and this class leaves out
    processor: Mapping[str, Any] = MappingProxyType({})  #: the file beside the weights; what it says holds in place of these
    model: Any

    def __init__(self, model: PreTrainedModel, image_size: Count | None = None) -> None:
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
    def from_config(cls, config: dict[str, Any], image_size: Count | None = None, dtype: str = "float32") -> Self:
        """Random weights.

        Args:
            config: the library's keys (``hidden_size``, ``patch_size`` …).
            image_size: see the class.
            dtype: of the weights.

        Raises:
            ValueError: a key is misspelt.
        """
        return cls(cls._build(config, dtype), image_size)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, config: dict[str, Any] | None = None, image_size: Count | None = None, dtype: str = "float32"
    ) -> Self:
        """A folder in the library's format or a name on the hub, with its own image processor where it holds one.

        On the meta device with ``config`` given nothing is read.

        Args:
            source: folder or name.
            config: for the meta device; elsewhere it fills in what the stored configuration leaves open.
            image_size, dtype: see ``from_config``.

        Raises:
            ValueError: the weights do not fill the network exactly, or the processor does something else.
        """
        return cls._processed(source, config, dtype, image_size)

    @classmethod
    def _processed(
        cls, source: str | Path, config: dict[str, Any] | None, dtype: str, image_size: int | None, **arguments: Any
    ) -> Self:
        """The encoder with the image processor of its checkpoint, where that says anything; else the first release's."""
        said = {} if on_meta_device() else image_processor_of(find_source(source))
        stated = stock_processor(said, str(source), crops=cls.crop_ratio is not None)
        encoder = cls(cls._load(source, config, dtype), image_size or stated.get("stock_size"), **arguments)
        for name, value in {**stated, "processor": said}.items():
            setattr(encoder, name, value)
        return encoder

    @classmethod
    def _build(cls, config: dict[str, Any], dtype: str) -> PreTrainedModel:
        defaults, name = cls.config_kind().to_dict(), f"{cls.kind.__name__}.config"
        assert_known(name, config, set(defaults))
        for part in ("text_config", "vision_config"):
            if part in config:
                assert_known(f"{name}.{part}", config[part], set(defaults[part]))
        model: Any = cls.kind._from_config(cls.config_kind(**config))
        return cast(PreTrainedModel, model if dtype == "float32" else model.to(torch_dtype(dtype)))

    @classmethod
    def _load(cls, source: str | Path, config: dict[str, Any] | None, dtype: str) -> PreTrainedModel:
        found = find_source(source, cls.kind)
        if not on_meta_device():
            return cast(PreTrainedModel, load_checkpoint(cls.kind, found, dtype, cls.optional, config))
        if config is None:  # the source's own, without its weights
            stored = checked_config(cls.kind, found) or cls.config_kind.from_pretrained(found)
            return cast(PreTrainedModel, cls.kind._from_config(stored))
        return cls._build(config, dtype)

    def forward(self, images: Tensor) -> Tensor:
        """The one vector of each image after the final norm."""
        return self.vector(self.vision(self.pixels(images))).to(images.dtype)

    def vector_and_tokens(self, images: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """In one pass; of images of exactly ``image_size`` nothing is cut away for the vector either."""
        output = self._seen(images, layers)
        return self.vector(output).to(images.dtype), [self.patches(output, layer).to(images.dtype) for layer in layers]

    def grid_of(self, height: int, width: int) -> Grid:
        """See the base class: any multiples of a patch, the network's positions interpolated by the library."""
        if (height, width) == (self.image_size, self.image_size):
            return self.grid
        patch = self.image_size // self.grid.h
        if height % patch or width % patch or self.image_size % patch:
            expected = f"{self.image_size} x {self.image_size} px, the size of the encoder, or multiples of {patch} px, its patches"
            raise UserError("data.image_size", f"{height} x {width} px", expected)
        return Grid(height // patch, width // patch)

    def as_they_are(self, images: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """See the base class."""
        if (grid := self.grid_of(*images.shape[-2:])) == self.grid:
            return self.vector_and_tokens(images, layers)
        self._check_layers(layers)
        tower = getattr(self.model, "vision_model", self.model)
        output = tower(pixel_values=self.normalised(images), output_hidden_states=True, **self.stretches)
        tokens = [self.patches(output, layer, grid).to(images.dtype) for layer in layers]
        return self.vector(output).to(images.dtype), tokens

    def vector(self, output: Any) -> Tensor:
        """The one vector ``[B, width]`` of what ``vision`` gave."""
        return self.pooled(output)

    def pixels(self, images: Tensor, whole: bool = False) -> Tensor:
        """Resized and normalised as by the stock processor, ``[B, 3, image_size, image_size]``.

        Args:
            images: ``[B, 3, H, W]``.
            whole: take images of exactly ``image_size`` as they are, where the processor would still resize and cut them. At other
                sizes than the processor's they always are.
        """
        as_is = images.shape[-2] == images.shape[-1] == self.image_size and (whole or self.image_size != self.stock_size)
        crop_from = None if as_is or self.crop_ratio is None else round(self.image_size * self.crop_ratio)
        return self.normalised(resize_to(images, self.image_size, crop_from, self.interpolation))

    def normalised(self, images: Tensor) -> Tensor:
        """With the mean and deviation of the stock processor, in the network's precision."""
        mean, std = (constants(images.device, tuple(values), images.dtype)[:, None, None] for values in (self.mean, self.std))
        return ((images * 0.5 + 0.5 - mean) / std).to(self.model.dtype)

    def tokens(self, images: Tensor, layer: int = -1) -> Tensor:
        """Patch tokens of a layer; of images of exactly ``image_size`` nothing is cut away, so that cells stay in place.

        Raises:
            ValueError: there is no such layer.
        """
        return self.tokens_of(images, [layer])[0]

    def tokens_of(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Patch tokens of several layers, from one pass."""
        output = self._seen(images, layers)
        return [self.patches(output, layer).to(images.dtype) for layer in layers]

    def _seen(self, images: Tensor, layers: Sequence[int]) -> Any:
        """What ``vision`` gives for whole images, with the states of these layers."""
        self._check_layers(layers)
        return self.vision(self.pixels(images, whole=True), output_hidden_states=any(layer != -1 for layer in layers))

    def _check_layers(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if not -self.num_layers - 1 <= layer <= -1:
                raise ValueError(f"{type(self).__name__}.layer: found {layer}, expected {-self.num_layers - 1} to -1")

    def patches(self, output: Any, layer: int, grid: Grid | None = None) -> Tensor:
        """Patch tokens ``[B, N, D]`` of a layer of what ``vision`` gave; class and register tokens come first and are left out."""
        state: Tensor = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return state[:, -(grid or self.grid).num_cells :]

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
        """transformers' format: ``config.json`` and ``model.safetensors``, and the image processor that came with the weights."""
        assert_writable(self.model, f"{type(self).__name__}.save")
        self.model.save_pretrained(folder)
        if self.processor:
            text = json.dumps(dict(self.processor), indent=2) + "\n"
            (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")
