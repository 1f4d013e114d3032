"""Qwen2.5-VL, through transformers; the only file that knows its attribute paths."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from umm_zoo.backbones.decoder_attention import read_no_masks
from umm_zoo.backbones.decoder_stack import DecoderStack
from umm_zoo.backbones.encoded_rows import GridLayout, LayoutRule
from umm_zoo.backbones.encoding import special_id
from umm_zoo.backbones.language_models import attention_by_part
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.loading import (
    assert_stated,
    checked_config,
    find_source,
    load_checkpoint,
    mark_quantized,
    on_meta_device,
    torch_dtype,
)
from umm_zoo.backbones.mrope import row_positions
from umm_zoo.backbones.prefix import PrefixBackbone
from umm_zoo.backbones.quantization import assert_writable
from umm_zoo.backbones.qwen_config import UNDECLARED, match_tokenizer, patch_layout, read_config
from umm_zoo.backbones.qwen_images import PatchLayout
from umm_zoo.backbones.qwen_tower import batch_segments, encode
from umm_zoo.backbones.recomputing import CHECKPOINTING
from umm_zoo.backbones.templates import SYSTEM_PROMPT, QwenChat
from umm_zoo.backbones.tokenizer import is_here, load_tokenizer, tokenizer_source
from umm_zoo.batch import Grid, Images


class Qwen25VL(LibraryVLM, PrefixBackbone):
    """A vision transformer with windowed attention, a merger of 2 x 2 patches, and a causal language model with M-RoPE.

    Images may have any size; the image's token grid follows from it (``image_grid``). Build it with ``from_pretrained`` or
    ``from_config``.

    Reference: Bai et al., "Qwen2.5-VL Technical Report" (arXiv 2502.13923).

    Args:
        model: the library's model.
        tokenizer: None only on the meta device, where one that is elsewhere is not read.
        layout: how images are resized and cut.
        system_prompt: put before a conversation without a system turn; None puts none.
        gradient_checkpointing: recompute the layers of trained parts in the backward pass instead of storing them.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase | None,
        layout: PatchLayout,
        system_prompt: str | None = SYSTEM_PROMPT,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.layout = layout
        self.template = QwenChat(system_prompt)
        self._tokenizer = tokenizer
        self.width = cast(Any, model.config).text_config.hidden_size
        self.image_size, self.image_token_id = None, model.config.image_token_id
        if gradient_checkpointing:
            with warnings.catch_warnings():  # the library's newer name for it is not in every version that this package admits
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
            model.disable_input_require_grads()  # the library makes frozen embeddings require gradients, a graph nobody needs
        # The merger lives inside the library's vision tower and lm_head outside its language model, so a part is a group of
        # modules. The groups are kept in a plain dict: registered, every tensor would stand twice in the state dict.
        visual, language = self.model.model.visual, self.model.model.language_model
        batch_segments(visual)
        read_no_masks(language)
        self._parts: dict[str, nn.Module] = {
            "vision_tower": nn.ModuleDict({"patch_embed": visual.patch_embed, "blocks": visual.blocks}),
            "projector": visual.merger,
            "language_model": nn.ModuleDict({"model": language, "lm_head": self.model.lm_head}),
        }

    # -- construction ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        tokenizer: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = SYSTEM_PROMPT,
        dtype: str = "float32",
        attention: str = "sdpa",
        tower_attention: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> Qwen25VL:
        """Random weights of any size. On the meta device nothing is read but a tokenizer that is on this machine.

        Args:
            config: ``text_config`` and ``vision_config`` as in the library's ``config.json``; token ids left out are the
                tokenizer's.
            tokenizer: name or folder; None is the one shipped with this package.
            min_pixels, max_pixels: images of a smaller and a larger area are resized; None is 4 and 16,384 tokens.
            system_prompt: put before a conversation without a system turn; None puts none.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            attention: ``sdpa``, ``flex_attention`` (on a GPU masks cost only the blocks they let through; elsewhere as ``sdpa``),
                ``eager``, ``flash_attention_2`` …; a bridge needs one of the first three.
            tower_attention: the vision tower's; None is ``attention``. With ``sdpa`` windows of one size share a call, and on a GPU
                in half precision a flash kernel takes all at once.
            gradient_checkpointing: see the class.

        Raises:
            ValueError: an unknown key or dtype, sizes that do not fit, token ids other than the tokenizer's.
        """
        built = read_config(config)
        reader = None
        if is_here(tokenizer) or not on_meta_device():
            reader = load_tokenizer(tokenizer)
            match_tokenizer(built, reader, config)
        layout = patch_layout(built, min_pixels, max_pixels)
        return cls(_new_model(built, dtype, attention, tower_attention), reader, layout, system_prompt, gradient_checkpointing)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = SYSTEM_PROMPT,
        dtype: str = "float32",
        attention: str = "sdpa",
        tower_attention: str | None = None,
        gradient_checkpointing: bool = False,
        quantization: dict[str, Any] | None = None,
    ) -> Qwen25VL:
        """Weights of a model name or folder in the library's format. On the meta device with ``config`` nothing is read from disk.

        Args:
            source: name or folder, such as ``Qwen/Qwen2.5-VL-3B-Instruct``.
            config: what the checkpoint is expected to be, for building without it; compared with what is found when loading.
            tokenizer: name or folder; None is the checkpoint's own, or the shipped one where a folder has none.
            min_pixels, max_pixels: None is the checkpoint's own bound.
            system_prompt, dtype, attention, tower_attention, gradient_checkpointing: see ``from_config``.
            quantization: 8 or 4 bits a weight, in the library's own words, see ``Quantization.read``; for a part that is frozen.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; the configuration is not the expected one.
        """
        source = find_source(source, Qwen2_5_VLForConditionalGeneration)
        if on_meta_device():
            if config is None:
                built: Any = checked_config(Qwen2_5_VLForConditionalGeneration, source) or Qwen2_5_VLConfig.from_pretrained(source)
            else:
                built = read_config(config)
            layout, words = patch_layout(built, min_pixels, max_pixels), tokenizer_source(source, tokenizer)
            reader = None
            if is_here(words):
                reader = load_tokenizer(words)
                match_tokenizer(built, reader, built.to_dict() if config is None else config)
            model = mark_quantized(_new_model(built, dtype, attention, tower_attention), source, quantization)
            return cls(model, reader, layout, system_prompt, gradient_checkpointing)
        kind = Qwen2_5_VLForConditionalGeneration
        attends = attention_by_part(attention, tower=tower_attention)
        model = load_checkpoint(kind, source, dtype, (), config, quantization, attn_implementation=attends)
        assert_stated(source, config, model.config, UNDECLARED)
        reader = load_tokenizer(tokenizer_source(source, tokenizer))
        match_tokenizer(model.config, reader, model.config.to_dict())
        layout = patch_layout(model.config, min_pixels, max_pixels, source)
        return cls(model.train(), reader, layout, system_prompt, gradient_checkpointing)

    def save(self, folder: str | Path) -> None:
        """Write weights, tokenizer and preprocessor in the library's format, for ``from_pretrained`` here or in the library."""
        assert_writable(self.model, "Qwen25VL.save")
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.layout.save(Path(folder))

    # -- structure ---------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            RuntimeError: the model was built on the meta device, without one that is on this machine.
        """
        if self._tokenizer is None:
            raise RuntimeError("Qwen25VL was built on the meta device, where no tokenizer is read; it can be counted but not run")
        return self._tokenizer

    @property
    def text_model(self) -> Any:
        """The library's language model."""
        return self.model.model.language_model

    @property
    def lm_head(self) -> nn.Module:
        """The output layer."""
        return cast(nn.Module, self.model.lm_head)

    @property
    def pad_id(self) -> int:
        """That of ``<|endoftext|>``."""
        return special_id(self.tokenizer, "<|endoftext|>")

    @cached_property
    def stop_ids(self) -> list[int]:
        """The template's, and the end of text."""
        return [*super().stop_ids, self.pad_id]

    def parts(self) -> dict[str, nn.Module]:
        """``vision_tower`` (patch embedding and blocks), ``projector`` (the merger), ``language_model`` (embeddings to lm_head)."""
        return self._parts

    def image_grid(self, height: int, width: int) -> Grid:
        """Grid of tokens that an image of that many pixels becomes."""
        return self.layout.grid(height, width)

    @property
    def layout_rule(self) -> LayoutRule:
        """As the base class."""
        return GridLayout(self.layout)

    # -- inputs ------------------------------------------------------------------------------------------------------------

    def encode_images(self, images: Images) -> list[Tensor]:
        """As the base class; any sizes, packed behind one another."""
        grids, merge = self.image_grids(images), self.layout.merge_size
        sizes = [(grid.h * merge, grid.w * merge) for grid in grids]
        made = encode(self.model.model.visual, self.layout.patches(images), sizes).pooler_output
        return list(made.split([grid.num_cells for grid in grids]))

    def position_ids(self, token_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, grids: Sequence[Grid]) -> Tensor:
        """M-RoPE's time, row and column, ``[3, B, L]``."""
        return row_positions(attention_mask, image_mask, grids)

    def language_stack(self, copied: bool) -> DecoderStack:
        """The layers and final norm of the language model, or a trainable copy of them without the token embeddings."""
        language = self.model.model.language_model
        stack = DecoderStack(language.layers, language.norm, language.rotary_emb)
        return stack.copied() if copied else stack


def _new_model(config: Qwen2_5_VLConfig, dtype: str, attention: str, tower: str | None) -> Qwen2_5_VLForConditionalGeneration:
    attends = attention_by_part(attention, tower=tower)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch_dtype(dtype), attn_implementation=attends)
