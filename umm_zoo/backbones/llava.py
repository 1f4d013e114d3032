"""LLaVA through transformers: vision tower, MLP projector, language model; the only file that knows their attribute paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.encoded_rows import HasGrid, SeveralPerCell, WholePatches
from umm_zoo.backbones.frozen import freeze, rest_unused
from umm_zoo.backbones.language_models import assert_positions, shape_logits
from umm_zoo.backbones.latent_codec import SOURCE_LATENTS, LatentCodec
from umm_zoo.backbones.llava_loading import (
    Dtype,
    assemble,
    llava_config,
    load_llava,
    new_llava,
    pixel_statistics,
    read_config,
)
from umm_zoo.backbones.loading import assert_stated, checked_config, find_source, mark_quantized, on_meta_device
from umm_zoo.backbones.square_vlm import SquareVLM
from umm_zoo.backbones.templates import ChatML, ChatTemplate
from umm_zoo.backbones.tokenizer import tokenizer_source
from umm_zoo.batch import Batch, Grid, Images, stacked
from umm_zoo.blocks.fusion import TokenFusion
from umm_zoo.blocks.transformer import as_tokens
from umm_zoo.errors import Count, UserError


class LlavaBackbone(SquareVLM):
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

    Raises:
        UserError: rows may be longer than the language model has learned positions (GPT-2, OPT).
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        max_length: Count = 2048,
        gradient_checkpointing: bool = False,
        source: str | None = None,
    ) -> None:
        whole: Any = model.model
        self.codec: LatentCodec | None = None
        self._stored: Sequence[Tensor] | Tensor | None = None  # the codec's latents of the images at hand, where shards hold them
        self._cells, self._per_cell = Grid(0, 0), 1  # of a fusion
        parts = (whole.vision_tower, whole.multi_modal_projector, whole.language_model, model.lm_head)
        vision: Any = model.config.vision_config
        statistics = pixel_statistics(vision.model_type, source)
        assert_positions(model.config.text_config, max_length)
        super().__init__(model, parts, statistics, tokenizer, template or ChatML(), max_length, gradient_checkpointing)
        shape_logits(model.lm_head, model.config.text_config)
        rest_unused(self.vision_tower, self._feature_layers)

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
            attention: ``sdpa`` (``eager`` for a language model that has none), ``flex_attention``, ``eager``,
                ``flash_attention_2`` …

        Raises:
            ValueError: an unknown field, or a tower whose features are not a grid.
        """
        built = llava_config(config, tokenizer)
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
        quantization: dict[str, Any] | None = None,
    ) -> LlavaBackbone:
        """A whole model in the library's format.

        Args:
            source: name or folder, such as ``llava-hf/llava-1.5-7b-hf``.
            config: what the checkpoint is expected to be; on the meta device it is used in its place and nothing is read.
            tokenizer: None is the checkpoint's own, or the shipped one where a folder has none.
            template, max_length, gradient_checkpointing: see the class.
            dtype: ``auto`` is the checkpoint's own.
            attention: see ``from_config``.
            quantization: 8 or 4 bits a weight, in the library's own words, see ``Quantization.read``; for a part that is frozen.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; the configuration is not the one stated.
        """
        source = find_source(source, LlavaForConditionalGeneration)
        tokenizer = tokenizer_source(source, tokenizer)
        if on_meta_device():
            if config is None:
                found: Any = checked_config(LlavaForConditionalGeneration, source) or read_config(source)
            else:
                found = llava_config(config, tokenizer)
            model = mark_quantized(new_llava(found, dtype, attention), source, quantization)
            return cls(model, tokenizer, template, max_length, gradient_checkpointing)
        model = load_llava(source, dtype, attention, config, quantization)
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
        quantization: dict[str, Any] | None = None,
    ) -> LlavaBackbone:
        """A vision tower, a language model and a new projector: where LLaVA's stage 1 starts.

        Args:
            vision_tower: name or folder (a CLIP or SigLIP model's vision half is taken, or a LLaVA's), or a configuration for
                random weights.
            language_model: the same for the language model; a LLaVA's is taken without its projector.
            config: fields of ``LlavaConfig``; with ``vision_config`` and ``text_config`` no name is read on the meta device
                (of a folder its ``config.json``).
            tokenizer: None is the language model's own, the shipped one for random weights.
            template, max_length, gradient_checkpointing: see the class.
            dtype: ``auto`` is each part's own.
            attention: see ``from_config``.
            quantization: of the language model: 8 or 4 bits a weight, in the library's own words, see ``Quantization.read``.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; a configuration is not the one stated.
        """
        vision_tower, language_model = (
            find_source(part, AutoModel) if isinstance(part, str) else part for part in (vision_tower, language_model)
        )
        if tokenizer is None and isinstance(language_model, str):
            tokenizer = language_model
        model = assemble(vision_tower, language_model, config or {}, dtype, attention, tokenizer, quantization)
        source = vision_tower if isinstance(vision_tower, str) and not on_meta_device() else None
        return cls(model, tokenizer, template, max_length, gradient_checkpointing, source)

    # -- structure -----------------------------------------------------------------------------------------------------------

    @property
    def _feature_layers(self) -> list[int]:
        stated = self.config.vision_feature_layer
        return [stated] if isinstance(stated, int) else list(stated)

    def tower_features(self, pixels: Tensor) -> Tensor:
        """The states of the layers that the configuration names, without the class token where it says so."""
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = torch.cat([states[layer] for layer in self._feature_layers], dim=-1)
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    # -- fusion with a codec -------------------------------------------------------------------------------------------------

    def fuse(self, codec: LatentCodec, fusion: TokenFusion) -> None:
        """As the base class. The part ``projector`` is the fusion from now on, and ``codec`` a further part, which stays frozen.

        The codec sees the tower's square. Where it has fewer cells than the tower tokens, the s x s tokens of a cell stand beside
        each other in width (pixel shuffle).
        """
        side, tower = self.image_size, self.grid
        cells = codec.latent_grid(side, side)
        along = tower.h // cells.h
        if not along or tower != (along * cells.h, along * cells.w):
            found = f"a codec with {cells.h} x {cells.w} cells beside a tower with {tower.h} x {tower.w} tokens at {side} px"
            raise UserError("method.codec", found, "equal grids, or cells of s x s whole tokens")
        wide = along**2 * self.config.vision_config.hidden_size * len(self._feature_layers)
        for what, own, expected in (
            ("understanding_dim", fusion.understanding_dim, wide),
            ("detail_dim", fusion.detail_dim, codec.latent_channels),
            ("width", fusion.width, self.width),
        ):
            if own is not None and own != expected:
                whose = f" ({along} x {along} tokens of the tower in a cell)" if what == "understanding_dim" and along > 1 else ""
                raise UserError(f"method.fusion.{what}", str(own), f"{expected}{whose}")
        self.codec, self.projector, self._cells, self._per_cell = freeze(codec), fusion, cells, fusion.tokens_per_cell
        self.grid = self.image_grid(side, side)

    def parts(self) -> dict[str, nn.Module]:
        """As the base class, and the ``codec`` of a fusion."""
        return super().parts() | ({} if self.codec is None else {"codec": self.codec})

    def save(self, folder: str | Path) -> None:
        """As the base class.

        Raises:
            UserError: a fusion stands in the projector's place, for which the library has no format.
        """
        if self.codec is not None:
            found = f"a LLaVA with a {type(self.projector).__name__}, for which the library has no format"
            raise UserError("method.fusion", found, "a LLaVA with its own projector", "Method.load reads the run's own folder")
        super().save(folder)

    @property
    def _patches(self) -> HasGrid:
        if self.codec is None:
            return super()._patches
        vision = self.config.vision_config
        cells = WholePatches(vision.patch_size * (vision.image_size // vision.patch_size // self._cells.h))
        return cells if self._per_cell == 1 else SeveralPerCell(cells, self._per_cell)

    def forms_grid(self, height: int, width: int) -> bool:
        """As the base class."""
        return self._per_cell == 1

    def inputs_of(self, batch: Batch) -> VLMInputs:
        """As the base class; latents of a fusion's codec that the shards hold are not made again."""
        self._stored = None if self.codec is None else batch.extras.get(SOURCE_LATENTS)
        try:
            return super().inputs_of(batch)
        finally:
            self._stored = None

    def project(self, features: Tensor, images: Images) -> Tensor:
        """As the base class."""
        if self.codec is None:
            return super().project(features, images)
        detail = self._detail(images).to(features)
        return self.projector(_shuffled(features, self._cells), detail, self._cells)

    @torch.no_grad()
    def _detail(self, images: Images) -> Tensor:
        """Latents of images as tokens ``[M, h*w, C]``; zeros of the image that stands where a batch with stored ones has none."""
        assert self.codec is not None
        if self._stored is None:
            return as_tokens(self.codec.encode(stacked(images)))
        if not len(self._stored):
            return torch.zeros(len(images), self._cells.num_cells, self.codec.latent_channels)
        latents = stacked(self._stored)
        if (len(latents), *latents.shape[-2:]) != (expected := (len(images), *self._cells)):
            found = f"{len(latents)} latents of {list(latents.shape[-2:])} cells"
            raise UserError(f"extras.{SOURCE_LATENTS}", found, f"{expected[0]} of {list(expected[1:])}, one per image")
        return as_tokens(latents)


def _shuffled(tokens: Tensor, cells: Grid) -> Tensor:
    """Tokens of a square ``[M, N, E]`` as ``[M, h*w, s*s*E]``, those of a cell beside each other in raster order."""
    along = int((tokens.shape[1] // cells.num_cells) ** 0.5)
    return rearrange(tokens, "M (h a w b) E -> M (h w) (a b E)", h=cells.h, w=cells.w, a=along, b=along)
