"""Vision-language models of transformers whose images are squares of one size, and whose tokens stand one after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from umm_zoo.backbones.adapters import learns
from umm_zoo.backbones.decoder_attention import read_no_masks
from umm_zoo.backbones.encoded_rows import GridLayout, HasGrid, LayoutRule, WholePatches
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.loading import on_meta_device
from umm_zoo.backbones.quantization import assert_writable
from umm_zoo.backbones.recomputing import CHECKPOINTING
from umm_zoo.backbones.templates import ChatTemplate
from umm_zoo.backbones.tokenizer import assert_vocabulary, image_token, is_here, load_tokenizer
from umm_zoo.batch import IMAGE_MARKER, Grid, Images, stacked
from umm_zoo.errors import UserError


class LanguageModel(nn.Module):
    """A decoder and its output layer as one part; the two may share the embedding matrix."""

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.model, self.lm_head = model, lm_head


class _KeepsNothing(DynamicCache):
    """Cache that stays empty: keys and values go through."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As they come."""
        return key_states, value_states


class SquareVLM(LibraryVLM):
    """A tower for square images of one size, a projector, and a causal language model whose positions are the running index.

    A subclass names the library's parts, and says what the tower gives.

    Args:
        model: the library's whole model.
        parts: its vision tower, projector, decoder and output layer.
        statistics: mean and standard deviation of pixels in [0, 1], per colour.
        tokenizer: name or folder, None for the shipped one.
        template: form of the conversations.
        max_length: longest row in tokens; longer ones are cut on the right, never through an image. None cuts nothing.
        gradient_checkpointing: recompute the layers of the language model in the backward pass instead of storing them.

    Attributes:
        grid: the image tokens of one image, in raster order.
    """

    image_size: int
    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        parts: tuple[nn.Module, nn.Module, nn.Module, nn.Module],
        statistics: tuple[list[float], list[float]],
        tokenizer: str | None,
        template: ChatTemplate,
        max_length: int | None,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self._whole: tuple[Any] = (model,)  # a tuple, so that torch does not register every part a second time
        self.vision_tower, self.projector = parts[:2]
        self.language_model = LanguageModel(*parts[2:])
        self.config: Any = model.config
        read_no_masks(self.text_model)
        self.image_token_id = self.config.image_token_id
        self.image_size, self.width = self.config.vision_config.image_size, self.config.text_config.hidden_size
        self.grid = self.image_grid(self.image_size, self.image_size)
        self.template, self.max_length = template, max_length
        self._tokenizer_source = tokenizer
        mean, std = statistics
        self.register_buffer("image_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            # the library has renamed it, and warns of the old name
            decoder = self.text_model
            enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
            enable(CHECKPOINTING)
        if is_here(tokenizer) or not on_meta_device():
            _ = self.tokenizer  # one with too many tokens is refused here, and not in mid-training

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer in the library's format, for ``from_pretrained`` here or there."""
        if self._whole[0] is None:
            expected = "a whole model (Method.load reads the run as it is)"
            raise UserError(f"{type(self).__name__}.save", "one that has given its language model to another network", expected)
        assert_writable(self._whole[0], f"{type(self).__name__}.save")
        self._whole[0].save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    # -- structure -----------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer (``--check``, on the meta device, reads none that is not on this machine).

        Raises:
            ValueError: it has more tokens than the language model.
        """
        found = load_tokenizer(self._tokenizer_source)
        assert_vocabulary(found, self.config.text_config.vocab_size)
        if IMAGE_MARKER not in found.get_vocab() and image_token(found) != self.image_token_id:
            found = load_tokenizer(self._tokenizer_source)  # another token, or a row that no text uses, stands for an image
        return found

    @property
    def text_model(self) -> Any:
        """The library's decoder."""
        return self.language_model.model

    @property
    def lm_head(self) -> nn.Module:
        """The output layer."""
        return self.language_model.lm_head

    def parts(self) -> dict[str, nn.Module]:
        """``vision_tower``, ``projector``, ``language_model`` (embeddings to ``lm_head``)."""
        return {"vision_tower": self.vision_tower, "projector": self.projector, "language_model": self.language_model}

    def give_language_model(self) -> LanguageModel:
        """Hand the language model over to another network; from now on this one encodes images alone."""
        given, self.language_model = self.language_model, LanguageModel(nn.Identity(), nn.Identity())
        self._whole = (None,)
        return given

    # -- inputs --------------------------------------------------------------------------------------------------------------

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to what the tower takes: shifted and scaled per colour. Shape: ``[M, 3, H, W]`` both."""
        return ((images + 1) / 2 - self.image_mean) / self.image_std

    def image_grid(self, height: int, width: int) -> Grid:
        """Whole patches."""
        return self._patches.grid(height, width)

    @property
    def layout_rule(self) -> LayoutRule:
        """As the base class."""
        return GridLayout(self._patches)

    @property
    def _patches(self) -> HasGrid:
        return WholePatches(cast(int, self.config.vision_config.patch_size))

    @abstractmethod
    def tower_features(self, pixels: Tensor) -> Tensor:
        """What the projector takes of normalised images, ``[M, N, E]``."""

    def encode_images(self, images: Images) -> list[Tensor]:
        """As the base class.

        Raises:
            UserError: an image has another size than the tower's.
        """
        for image in images:
            if image.shape[-2:] != (self.image_size, self.image_size):
                found, side = "x".join(map(str, image.shape[-2:])), self.image_size
                raise UserError("data.image_size", f"images of {found} pixels", f"the vision tower's {side}x{side}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns(self.vision_tower)):
            features = self.tower_features(self.normalise(stacked(images)))
        return list(self.project(features.to(next(self.projector.parameters()).dtype), images))

    def project(self, features: Tensor, images: Images) -> Tensor:
        """What enters the language model, ``[M, N, D]``, of the tower's features ``[M, N, E]`` of images."""
        return cast(Tensor, self.projector(features))

    def position_ids(self, token_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The running index."""
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)

    @cached_property
    def _is_plain(self) -> bool:
        """Whether every layer attends to all that stands before."""
        return set(getattr(self.text_model.config, "layer_types", None) or ["full_attention"]) == {"full_attention"}

    def run(
        self, embeddings: Tensor, mask: Tensor | None, position_ids: Tensor, cache: DynamicCache | None = None, **extras: Any
    ) -> Tensor:
        """As the base class."""
        if mask is None and cache is None and not self.gradient_checkpointing and self._is_plain:
            cache = _KeepsNothing()  # without one the library looks for packed rows, and a GPU must be waited for
        return super().run(embeddings, mask, position_ids, cache, **extras)
