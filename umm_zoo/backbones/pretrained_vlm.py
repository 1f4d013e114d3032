"""Any vision-language model of the transformers library whose family is known, with the processor beside its weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.decoder_attention import read_no_masks
from umm_zoo.backbones.decoder_stack import DecoderStack
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.encoded_rows import ImageLayout, LayoutRule
from umm_zoo.backbones.families import use
from umm_zoo.backbones.language_models import attention_by_part
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.llava_loading import Dtype
from umm_zoo.backbones.loading import (
    assert_stated,
    checked_config,
    find_source,
    load_checkpoint,
    mark_quantized,
    on_meta_device,
    one_line,
    torch_dtype,
)
from umm_zoo.backbones.prefix import PrefixBackbone
from umm_zoo.backbones.preparation import Asked, Preparation
from umm_zoo.backbones.processed_images import joined, waiting
from umm_zoo.backbones.quantization import assert_writable
from umm_zoo.backbones.recomputing import CHECKPOINTING
from umm_zoo.backbones.row_preparation import ImagePreparation, RowPreparation
from umm_zoo.backbones.stored_template import StoredTemplate
from umm_zoo.backbones.templates import ChatTemplate
from umm_zoo.backbones.tokenizer import tokenizer_source
from umm_zoo.backbones.vlm_families import VLM_FAMILIES, VLMFamily
from umm_zoo.backbones.vlm_processor import copy_processor, load_images, load_words, processed, stored_template
from umm_zoo.batch import Batch, Grid, Images
from umm_zoo.errors import Count, UserError


class PretrainedVLM(LibraryVLM, PrefixBackbone):
    """A checkpoint of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-1.5, -NeXT or -OneVision, InternVL3, SmolVLM or Gemma 3.

    Everything is the checkpoint's own: tokenizer, chat template, image processor (the library's PIL back-end; torchvision is not
    needed). Images of any sizes are rounded to 8 bits and resized as the library does, on the CPU, so no gradient reaches them;
    ``Qwen25VL`` and ``LlavaBackbone`` prepare theirs on the device. Build it with ``from_pretrained``.

    Args:
        model: the library's model.
        source: name or folder of the tokenizer, the chat template and the image processor.
        tokenizer: another name or folder of the tokenizer.
        template: None is the checkpoint's own.
        image_processor: settings of the image processor in the place of the checkpoint's, such as ``max_pixels`` (Qwen),
            ``crop_to_patches: false`` (InternVL) or ``do_image_splitting: false`` (SmolVLM).
        max_length: longest row in tokens; longer ones are cut on the right, never through an image. None cuts nothing.
        gradient_checkpointing: recompute the layers of trained parts in the backward pass instead of storing them.

    Raises:
        UserError: the folder has no processor, or not the model's.
    """

    exact = (
        *LibraryVLM.exact,
        *(f"{kind}_attention_{name}" for kind in ("full", "sliding") for name in ("inv_freq", "original_inv_freq")),
    )

    def __init__(
        self,
        model: Any,
        source: str,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        image_processor: dict[str, Any] | None = None,
        max_length: Count | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.source, self.max_length = source, max_length
        self._kind = VLM_FAMILIES[model.config.model_type]
        self._settings = {**self._kind.defaults, **(image_processor or {})}
        self._tokenizer_source, self._template = tokenizer_source(source, tokenizer), template
        self.width = model.config.get_text_config().hidden_size
        self.image_size, self.image_token_id = None, model.config.image_token_id
        if gradient_checkpointing:
            with warnings.catch_warnings():  # the library's newer name for it is not in every version that this package admits
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
            model.disable_input_require_grads()  # the library makes frozen embeddings require gradients, a graph nobody needs
        self._kind.rest(model)
        read_no_masks(self.text_model)
        self._parts = self._kind.parts(model)  # a plain dict: registered, every tensor would stand twice in the state dict
        if Path(source).is_dir() or not on_meta_device():
            _ = self.family, self.template  # what is missing is missed here, and not in mid-training

    # -- construction --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        image_processor: dict[str, Any] | None = None,
        max_length: Count | None = None,
        dtype: Dtype = "auto",
        attention: str = "sdpa",
        tower_attention: str | None = None,
        gradient_checkpointing: bool = False,
        quantization: dict[str, Any] | None = None,
    ) -> PretrainedVLM:
        """A whole model in the library's format.

        Args:
            source: name or folder, such as ``Qwen/Qwen3-VL-2B-Instruct``.
            config: what the checkpoint is expected to be, compared with what is found; with ``model_type`` it is used in its place
                on the meta device, where a name is not read.
            tokenizer, template, image_processor, max_length, gradient_checkpointing: see the class.
            dtype: ``auto`` is the checkpoint's own.
            attention: ``sdpa`` (``eager`` for a language model that has none), ``flex_attention``, ``eager``, ``flash_attention_2``
                …; a bridge needs one of the first three, see ``Qwen25VL.from_config``.
            tower_attention: the vision tower's; None is ``attention``, see ``Qwen25VL``.
            quantization: 8 or 4 bits a weight, in the library's own words, see ``Quantization.read``; for a part that is frozen.

        Raises:
            FileNotFoundError: nothing there.
            UserError: a model of a family that is not known here, or a folder without a processor.
            ValueError: tensors are missing, unexpected or of another shape; the configuration is not the one stated.
        """
        source = find_source(source, AutoModelForImageTextToText)
        elsewhere = on_meta_device() and config is not None and not Path(source).is_dir()
        with one_line(source, "a name or folder with a model configuration"):
            stored = config if elsewhere else PreTrainedConfig.get_config_dict(source)[0]
        if (kind := (stored or {}).get("model_type")) not in VLM_FAMILIES:
            hint = use(kind).removeprefix("; ") or "umm_zoo/backbones/README.md says how to add one"
            raise UserError(source, f"a model of type '{kind}'", f"one of {', '.join(VLM_FAMILIES)}", hint)
        attends = attention_by_part(attention, AutoConfig.for_model(**cast(Any, stored)).get_text_config(), tower_attention)
        if on_meta_device():
            built = None if elsewhere else checked_config(AutoModelForImageTextToText, source, config)
            built = built or AutoConfig.for_model(**cast(Any, stored))
            precision = torch_dtype("float32" if dtype == "auto" else dtype)
            model = AutoModelForImageTextToText.from_config(built, dtype=precision, attn_implementation=attends)
            mark_quantized(model, source, quantization)
        else:
            kind = AutoModelForImageTextToText
            model = load_checkpoint(kind, source, dtype, (), config, quantization, attn_implementation=attends)
        assert_stated(source, config, model.config)
        return cls(model.train(), source, tokenizer, template, image_processor, max_length, gradient_checkpointing)

    def save(self, folder: str | Path) -> None:
        """Write weights and processor in the library's format, for ``from_pretrained`` here or in the library."""
        assert_writable(self.model, "PretrainedVLM.save")
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        copy_processor(self.source, self.family.images, folder)

    # -- structure -----------------------------------------------------------------------------------------------------------

    @cached_property
    def family(self) -> VLMFamily:
        """The model as one of its family, with its tokenizer and image processor."""
        images = load_images(self.source, self.model.config.model_type, self._settings)
        here = Path(self.source).is_dir() or not on_meta_device()
        return self._kind(self.model, self.tokenizer if here else None, images, self._settings)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return load_words(self._tokenizer_source, self.model.config)

    @cached_property
    def template(self) -> ChatTemplate:  # type: ignore[override]
        """The form of conversations: as given, else that of the checkpoint."""
        if self._template is not None:
            return self._template
        return StoredTemplate(stored_template(self.source, self.tokenizer), self.tokenizer, self.family.marker)

    @property
    def text_model(self) -> Any:
        """The library's decoder."""
        return getattr(self.model.model, self._kind.decoder)

    @property
    def lm_head(self) -> nn.Module:
        """The output layer."""
        return cast(nn.Module, self.model.lm_head)

    @property
    def token_embeddings(self) -> Tensor:
        """The embedding matrix, ``[vocabulary, D]``, in the scale that enters the decoder."""
        weight = cast(Tensor, self.text_model.embed_tokens.weight)
        scale = getattr(self.text_model.embed_tokens, "embed_scale", None)
        return weight if scale is None else weight * scale.to(weight.dtype)

    @property
    def device(self) -> torch.device:
        """Name of the token embeddings."""
        return cast(Tensor, self.text_model.embed_tokens.weight).device

    @cached_property
    def stop_ids(self) -> list[int]:
        """The template's, and those of the checkpoint's generation."""
        stated = getattr(self.model.generation_config, "eos_token_id", None)
        own = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
        return sorted({*super().stop_ids, *own})

    def parts(self) -> dict[str, nn.Module]:
        """``vision_tower``, ``projector`` (all between tower and language model), ``language_model`` (embeddings to lm_head)."""
        return self._parts

    def language_stack(self, copied: bool) -> DecoderStack:
        """The layers and final norm of the language model, or a trainable copy of them without the token embeddings."""
        decoder, plain = self.text_model, not issubclass(self._kind, VLM_FAMILIES["qwen2_vl"])
        stack = DecoderStack(decoder.layers, decoder.norm, decoder.rotary_emb, plain)
        return stack.copied() if copied else stack

    # -- inputs --------------------------------------------------------------------------------------------------------------

    def image_grid(self, height: int, width: int) -> Grid:
        """Grid of tokens that an image of that many pixels becomes when it is the only one of its row; one row where they form
        none (tiles)."""
        return self.family.grid(height, width)

    def forms_grid(self, height: int, width: int) -> bool:
        """As the base class."""
        return self.family.forms_grid(height, width)

    def image_layout(self, height: int, width: int, count: int) -> ImageLayout:
        """As the base class."""
        return self.family.layout(height, width, count)

    @property
    def layout_rule(self) -> LayoutRule:
        """As the base class."""
        return self.family.without_weights().layout

    def encode_images(self, images: Images) -> list[Tensor]:
        """As the base class; each the only one of its row."""
        features, _ = self.image_features(images, [1] * len(images))
        return list(features.split([sum(own.runs) for (own,) in self.image_layouts(images, [1] * len(images))]))

    def image_features(self, images: Images, image_counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """As the base class."""
        made, dtype = self._processed(images, image_counts), self._dtype
        sent = {name: own.to(dtype) if own.is_floating_point() else own for name, own in made.items()}
        there = {name: own if name in self.family.on_host else send(own, self.device) for name, own in sent.items()}
        features, behind = self.family.features(there)
        expected = sum(run for row in self.image_layouts(images, image_counts) for image in row for run in image.runs)
        if len(features) != expected:
            found = f"{len(features)} features of {len(images)} images, where {expected} tokens stand for them"
            raise UserError(self.source, found, "an image processor with the sizes of config.json (tiles, image_size)")
        return features, behind

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._parts["vision_tower"].parameters()).dtype

    def preparation(self, asked: Callable[[Batch], Iterable[Asked]]) -> Preparation | None:
        """As the base class; images too, for the library's image processors run on the processor."""
        made = super().preparation(asked)
        process = ImagePreparation(self.family.images, self.family.settings, self._dtype)
        return replace(made, process=process) if isinstance(made, RowPreparation) else made

    def _processed(self, images: Images, image_counts: Sequence[int]) -> dict[str, Tensor]:
        """What the image processor makes: as a loader's worker has made it, or made now."""
        left, how = iter(images), (self.family.images, self.family.settings)
        rows = [list(islice(left, count)) for count in image_counts if count]
        made = [waiting(row) for row in rows]
        if all(own is None for own in made):
            return processed(images, image_counts, *how)
        whole = [processed(row, [len(row)], *how) if own is None else own for row, own in zip(rows, made, strict=True)]
        there = [{name: own.to(self.device) if own.is_floating_point() else own for name, own in row.items()} for row in whole]
        return joined(there)  # sizes and counts are read on the host

    def position_ids(self, token_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, grids: Sequence[Grid]) -> Tensor:
        """As the base class."""
        return self.family.position_ids(token_ids, attention_mask, image_mask, grids)

    def arguments(self, inputs: VLMInputs, cache: DynamicCache | None) -> dict[str, Any]:
        """As the base class."""
        return {**super().arguments(inputs, cache), **self.family.arguments(inputs, cache)}
