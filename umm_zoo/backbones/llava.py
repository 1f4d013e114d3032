"""LLaVA through transformers: vision tower, MLP projector, language model; the only file that knows their attribute paths."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from umm_zoo.backbones.adapters import assert_no_adapter
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.frozen import FrozenBackbone
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.llava_loading import Dtype, assemble, llava_config, load_llava, new_llava, pixel_statistics, read_config
from umm_zoo.backbones.loading import assert_stated, find_source, on_meta_device
from umm_zoo.backbones.loading import read_config as check_config
from umm_zoo.backbones.templates import ChatML, ChatTemplate
from umm_zoo.backbones.tokenizer import assert_vocabulary, is_here, load_tokenizer, tokenizer_source
from umm_zoo.batch import Conversation, Grid
from umm_zoo.errors import Count, UserError


class LanguageModel(nn.Module):
    """A decoder and its output layer as one part; the two may share the embedding matrix."""

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.model, self.lm_head = model, lm_head


class LlavaBackbone(LibraryVLM):
    """LLaVA-1.5 (Liu et al., arXiv 2310.03744): patch features of one tower layer, a two-layer MLP, a causal language model.

    Build it with ``from_config`` (random weights), ``from_parts`` (a tower and a language model, a new projector) or
    ``from_pretrained`` (a whole model). Tower layers behind the features' layer cannot reach the loss and stay without gradient.

    Args:
        model: the library's model.
        tokenizer: name or folder, None for the shipped one.
        template: None is ``ChatML()``.
        max_length: longest row in tokens; longer ones are cut on the right, never through an image.
        gradient_checkpointing: recompute the layers of the language model in the backward pass instead of storing them.
        source: whose processor says the mean and deviation of pixels; None, or one without a processor, is what the kind of tower
            was trained with.

    Attributes:
        grid: the image tokens of one image, in raster order.
    """

    image_size: int
    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        max_length: Count = 2048,
        gradient_checkpointing: bool = False,
        source: str | None = None,
    ) -> None:
        super().__init__()
        self._whole = (model,)  # a tuple, so that torch does not register every part a second time
        self.vision_tower: nn.Module = model.model.vision_tower
        self.projector: nn.Module = model.model.multi_modal_projector
        self.language_model = LanguageModel(model.model.language_model, model.lm_head)
        self.config: Any = model.config
        self.image_token_id = self.config.image_token_id
        vision: Any = model.config.vision_config
        self.image_size, self.width = vision.image_size, cast(Any, model.config.text_config).hidden_size
        self.grid = self.image_grid(self.image_size, self.image_size)
        self.template, self.max_length = template or ChatML(), max_length
        self._tokenizer_source = tokenizer
        mean, std = pixel_statistics(vision.model_type, source)
        self.register_buffer("image_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            # the library has renamed it, and warns of the old name
            decoder = self.text_model
            enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._rest_unused_layers()
        if is_here(tokenizer) or not on_meta_device():
            _ = self.tokenizer  # one with too many tokens is refused here, and not in mid-training

    # -- construction --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        max_length: Count = 2048,
        dtype: Dtype = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> LlavaBackbone:
        """Random weights of any size; nothing is read from disk.

        Args:
            config: fields of the library's ``LlavaConfig``: ``vision_config`` and ``text_config`` (each with ``model_type``),
                ``vision_feature_layer``, ``projector_hidden_act`` … Left out, ``vision_feature_select_strategy`` drops the class
                token where there is one, and the vocabulary is the shipped tokenizer's if that is the one used.
            tokenizer, template, max_length, gradient_checkpointing: see the class.
            dtype: of the weights.
            attention: ``sdpa``, ``eager``, ``flash_attention_2`` …

        Raises:
            ValueError: an unknown field, or a tower whose features are not a grid.
        """
        built = llava_config(config, shipped_tokenizer=tokenizer is None)
        return cls(new_llava(built, dtype, attention), tokenizer, template, max_length, gradient_checkpointing)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        max_length: Count = 2048,
        dtype: Dtype = "auto",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> LlavaBackbone:
        """A whole model in the library's format.

        Args:
            source: name or folder, such as ``llava-hf/llava-1.5-7b-hf``.
            config: what the checkpoint is expected to be; on the meta device it is used in its place and nothing is read.
            tokenizer: None is the checkpoint's own, or the shipped one where a folder has none.
            template, max_length, gradient_checkpointing: see the class.
            dtype: ``auto`` is the checkpoint's own.
            attention: see ``from_config``.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; the configuration is not the one stated.
        """
        source = find_source(source)
        tokenizer = tokenizer_source(source, tokenizer)
        if on_meta_device():
            if config is None:
                found: Any = check_config(LlavaForConditionalGeneration, source) or read_config(source)
            else:
                found = llava_config(config, shipped_tokenizer=tokenizer is None)
            return cls(new_llava(found, dtype, attention), tokenizer, template, max_length, gradient_checkpointing)
        model = load_llava(source, dtype, attention, config)
        assert_stated(source, config, model.config)
        return cls(model, tokenizer, template, max_length, gradient_checkpointing, source)

    @classmethod
    def from_parts(
        cls,
        vision_tower: str | dict[str, Any],
        language_model: str | dict[str, Any],
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        max_length: Count = 2048,
        dtype: Dtype = "auto",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> LlavaBackbone:
        """A vision tower, a language model and a new projector: where LLaVA's stage 1 starts.

        Args:
            vision_tower: name or folder (a CLIP or SigLIP model's vision half is taken, or a LLaVA's), or a configuration for
                random weights.
            language_model: the same for the language model; a LLaVA's is taken without its projector.
            config: fields of ``LlavaConfig``; with ``vision_config`` and ``text_config`` nothing is read on the meta device.
            tokenizer: None is the language model's own, the shipped one for random weights.
            template, max_length, gradient_checkpointing: see the class.
            dtype: ``auto`` is each part's own.
            attention: see ``from_config``.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; a configuration is not the one stated.
        """
        vision_tower, language_model = (
            find_source(part) if isinstance(part, str) else part for part in (vision_tower, language_model)
        )
        if tokenizer is None and isinstance(language_model, str):
            tokenizer = language_model
        model = assemble(vision_tower, language_model, config or {}, dtype, attention, shipped_tokenizer=tokenizer is None)
        source = vision_tower if isinstance(vision_tower, str) and not on_meta_device() else None
        return cls(model, tokenizer, template, max_length, gradient_checkpointing, source)

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer in the library's format, for ``from_pretrained`` here or there."""
        assert_no_adapter(self._whole[0], "LlavaBackbone.save")
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

    def _rest_unused_layers(self) -> None:
        """Take the gradient from tower parameters that cannot reach the features: DistributedDataParallel would wait for them."""
        layers = cast(nn.ModuleList, cast(Any, self.vision_tower).encoder.layers)
        used = max(layer % (len(layers) + 1) for layer in self._feature_layers)
        for layer in layers[used:]:
            layer.requires_grad_(False)
        for name in ("post_layernorm", "head"):  # they make the pooled vector
            if hasattr(self.vision_tower, name):
                getattr(self.vision_tower, name).requires_grad_(False)

    @property
    def _feature_layers(self) -> list[int]:
        stated = self.config.vision_feature_layer
        return [stated] if isinstance(stated, int) else list(stated)

    # -- inputs --------------------------------------------------------------------------------------------------------------

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to what the tower takes: shifted and scaled per colour. Shape: ``[M, 3, H, W]`` both."""
        return ((images + 1) / 2 - self.image_mean) / self.image_std

    def image_grid(self, height: int, width: int) -> Grid:
        """Whole patches."""
        patch = cast(int, self.config.vision_config.patch_size)
        return Grid(height // patch, width // patch)

    def encode_images(self, images: Tensor) -> Tensor:
        """As the base class.

        Raises:
            UserError: the images have another size than the tower's.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            found, side = "x".join(map(str, images.shape[-2:])), self.image_size
            raise UserError("data.image_size", f"images of {found} pixels", f"the vision tower's {side}x{side}")
        frozen = isinstance(self.vision_tower, FrozenBackbone)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            states = self.vision_tower(self.normalise(images), output_hidden_states=True).hidden_states
            features = torch.cat([states[layer] for layer in self._feature_layers], dim=-1)
            if self.config.vision_feature_select_strategy == "default":
                features = features[:, 1:]  # without the class token
        return cast(Tensor, self.projector(features.to(next(self.projector.parameters()).dtype)))

    def position_ids(self, token_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, grid: Grid) -> Tensor:
        """The running index."""
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)

    def embed(
        self,
        conversations: list[Conversation],
        images: Tensor | None,
        image_counts: list[int],
        for_generation: bool = False,
        opening: str = "",
    ) -> VLMInputs:
        """As the base class; a batch without images touches the same parameters, for ranks wait for each other's gradients."""
        inputs = super().embed(conversations, images, image_counts, for_generation, opening)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.projector.parameters())
        if trained and not sum(image_counts):
            blank = torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)
            inputs.embeddings = inputs.embeddings + 0 * self.encode_images(blank).sum().to(inputs.embeddings.dtype)
        return inputs

    def run(self, embeddings: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """As the base class."""
        if self.gradient_checkpointing:
            for layer in self.text_model.layers:  # the library recomputes in training mode only, which a frozen one never is in
                layer.training = cache is None and torch.is_grad_enabled()
        return super().run(embeddings, mask, position_ids, cache)
