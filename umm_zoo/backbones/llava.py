"""LLaVA through transformers: vision tower, MLP projector, language model. The only file that knows their attribute paths."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from umm_zoo.backbones.base import IGNORE, VLMBackbone, VLMInputs, VLMOutput, language_loss
from umm_zoo.backbones.frozen import FrozenBackbone
from umm_zoo.backbones.generation import decode
from umm_zoo.backbones.llava_loading import (
    Dtype,
    assemble,
    assert_stated,
    llava_config,
    load_checkpoint,
    pixel_statistics,
    read_config,
)
from umm_zoo.backbones.loading import find_source, on_meta_device, torch_dtype
from umm_zoo.backbones.templates import ChatML, ChatTemplate, encode, pad, stop_ids
from umm_zoo.backbones.tokenizer import load_tokenizer
from umm_zoo.batch import IMAGE_MARKER, Conversation, Grid
from umm_zoo.errors import MistakeError


class LanguageModel(nn.Module):
    """A decoder and its output layer as one part; the two may share the embedding matrix."""

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.model, self.lm_head = model, lm_head


class LlavaBackbone(VLMBackbone):
    """LLaVA-1.5 (Liu et al., arXiv 2310.03744): patch features of one tower layer, a two-layer MLP, a causal language model.

    Build it with ``from_config`` (random weights), ``from_parts`` (a tower and a language model, a new projector) or
    ``from_pretrained`` (a whole model). Tower layers behind the features' layer cannot reach the loss and stay without gradient.

    Args:
        model: the library's model.
        tokenizer: name or folder, None for the shipped one; read when first needed.
        template: None is ``ChatML()``.
        max_length: longest row in tokens; longer ones are cut on the right, never through an image.
        image_mean: per colour, of pixels in [0, 1]; None is what the kind of tower was trained with.
        image_std: see ``image_mean``.
        gradient_checkpointing: recompute the layers of the language model in the backward pass instead of storing them.

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
        max_length: int = 2048,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self._whole = (model,)  # a tuple, so that torch does not register every part a second time
        self.vision_tower: nn.Module = model.model.vision_tower
        self.projector: nn.Module = model.model.multi_modal_projector
        self.language_model = LanguageModel(model.model.language_model, model.lm_head)
        self.config: Any = model.config
        vision: Any = model.config.vision_config
        side = vision.image_size // vision.patch_size
        self.grid = Grid(side, side)
        self.image_size, self.width = vision.image_size, cast(Any, model.config.text_config).hidden_size
        self.template, self.max_length = template or ChatML(), max_length
        self._tokenizer_source = tokenizer
        mean, std = pixel_statistics(vision.model_type)
        self.register_buffer("image_mean", torch.tensor(image_mean or mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std or std).view(1, 3, 1, 1), persistent=False)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            # the library has renamed it, and warns of the old name
            enable = getattr(self._decoder, "activation_checkpointing_enable", None) or self._decoder.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._rest_unused_layers()

    # -- construction ------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        max_length: int = 2048,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        dtype: Dtype = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> LlavaBackbone:
        """Random weights of any size; nothing is read from disk.

        Args:
            config: fields of the library's ``LlavaConfig``: ``vision_config`` and ``text_config`` (each with ``model_type``),
                ``vision_feature_layer``, ``projector_hidden_act`` … Left out, ``vision_feature_select_strategy`` drops the class
                token where there is one, and the vocabulary is the shipped tokenizer's if that is the one used.
            tokenizer, template, max_length, image_mean, image_std, gradient_checkpointing: see the class.
            dtype: of the weights.
            attention: ``sdpa``, ``eager``, ``flash_attention_2`` …

        Raises:
            ValueError: an unknown field, or a tower whose features are not a grid.
        """
        built = llava_config(config, shipped_tokenizer=tokenizer is None)
        precision = torch_dtype("float32" if dtype == "auto" else dtype)
        model = LlavaForConditionalGeneration._from_config(built, dtype=precision, attn_implementation=attention)
        return cls(model, tokenizer, template, max_length, image_mean, image_std, gradient_checkpointing)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        max_length: int = 2048,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
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
            image_mean, image_std: None is what the checkpoint's own processor says, else what the kind of tower was trained with.
            dtype: ``auto`` is the checkpoint's own.
            attention: see ``from_config``.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; the configuration is not the one stated.
        """
        source = find_source(source)
        own = not Path(source).is_dir() or any(Path(source).glob("tokenizer*.json"))
        tokenizer = tokenizer or (source if own else None)
        if on_meta_device():
            built = read_config(source) if config is None else llava_config(config, shipped_tokenizer=tokenizer is None)
            whole = LlavaForConditionalGeneration._from_config(built, attn_implementation=attention)
            return cls(whole, tokenizer, template, max_length, image_mean, image_std, gradient_checkpointing)
        model = load_checkpoint(LlavaForConditionalGeneration, source, dtype, attention)
        assert_stated(source, config, model.config)
        mean, std = pixel_statistics(model.config.vision_config.model_type, source)
        return cls(model, tokenizer, template, max_length, image_mean or mean, image_std or std, gradient_checkpointing)

    @classmethod
    def from_parts(
        cls,
        vision_tower: str | dict[str, Any],
        language_model: str | dict[str, Any],
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        max_length: int = 2048,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
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
            image_mean, image_std: None is what the tower's own processor says, else what its kind was trained with.
            dtype: ``auto`` is each part's own.
            attention: see ``from_config``.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; a configuration is not the one stated.
        """
        vision_tower = find_source(vision_tower) if isinstance(vision_tower, str) else vision_tower
        language_model = find_source(language_model) if isinstance(language_model, str) else language_model
        if tokenizer is None and isinstance(language_model, str):
            tokenizer = language_model
        fields = dict(config or {})
        for name, part in (("vision_config", vision_tower), ("text_config", language_model)):
            if isinstance(part, Mapping):
                fields[name] = part
            elif on_meta_device() and name not in fields:
                found = read_config(part)
                fields[name] = getattr(found, name, found)  # the vision half of a contrastive model
        if on_meta_device():
            return cls.from_config(
                fields, tokenizer, template, max_length, image_mean, image_std, dtype, attention, gradient_checkpointing
            )
        model = assemble(vision_tower, language_model, fields, dtype, attention, shipped_tokenizer=tokenizer is None)
        vision: Any = model.config.vision_config
        mean, std = pixel_statistics(vision.model_type, vision_tower if isinstance(vision_tower, str) else None)
        return cls(model, tokenizer, template, max_length, image_mean or mean, image_std or std, gradient_checkpointing)

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer in the library's format, for ``from_pretrained`` here or there."""
        self._whole[0].save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    # -- structure ---------------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, read when first needed (``--check`` never needs it).

        Raises:
            ValueError: it has more tokens than the language model.
        """
        found = load_tokenizer(self._tokenizer_source)
        vocabulary = self.config.text_config.vocab_size
        if max(found.get_vocab().values()) >= vocabulary:
            raise ValueError(f"tokenizer: found ids up to {max(found.get_vocab().values())}, the language model has {vocabulary}")
        return found

    @cached_property
    def _stop_ids(self) -> list[int]:
        return stop_ids(self.tokenizer, self.template.end)

    @property
    def _decoder(self) -> Any:
        return self.language_model.model

    @property
    def device(self) -> torch.device:
        """Where the token embeddings are."""
        return cast(torch.device, self._decoder.embed_tokens.weight.device)

    def parts(self) -> dict[str, nn.Module]:
        """``vision_tower``, ``projector``, ``language_model`` (embeddings to ``lm_head``)."""
        return {"vision_tower": self.vision_tower, "projector": self.projector, "language_model": self.language_model}

    def _rest_unused_layers(self) -> None:
        """Take the gradient from tower parameters that cannot reach the features: DistributedDataParallel would wait for them."""
        layers = cast(nn.ModuleList, cast(Any, self.vision_tower).encoder.layers)
        wanted = self.config.vision_feature_layer
        used = max(layer % (len(layers) + 1) for layer in ([wanted] if isinstance(wanted, int) else wanted))
        for layer in layers[used:]:
            layer.requires_grad_(False)
        for name in ("post_layernorm", "head"):  # they make the pooled vector
            if hasattr(self.vision_tower, name):
                getattr(self.vision_tower, name).requires_grad_(False)

    # -- inputs ------------------------------------------------------------------------------------------------------------------

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to what the tower takes: shifted and scaled per colour. Shape: ``[M, 3, H, W]`` both."""
        return ((images + 1) / 2 - self.image_mean) / self.image_std

    def image_grid(self, height: int, width: int) -> Grid:
        """Grid of tokens that an image of that many pixels becomes."""
        patch = cast(int, self.config.vision_config.patch_size)
        return Grid(height // patch, width // patch)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images ``[M, 3, H, W]`` in [-1, 1] to what enters the language model, ``[M, N, D]``.

        Raises:
            ValueError: they have another size than the tower's.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            found = "x".join(map(str, images.shape[-2:]))
            raise MistakeError(
                f"images are {found} pixels, the vision tower takes {self.image_size}x{self.image_size} (data.image_size)"
            )
        frozen = isinstance(self.vision_tower, FrozenBackbone)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            states = self.vision_tower(self.normalise(images), output_hidden_states=True).hidden_states
            wanted = self.config.vision_feature_layer
            features = torch.cat([states[layer] for layer in ([wanted] if isinstance(wanted, int) else wanted)], dim=-1)
            if self.config.vision_feature_select_strategy == "default":
                features = features[:, 1:]  # without the class token
        return cast(Tensor, self.projector(features.to(next(self.projector.parameters()).dtype)))

    def embed(
        self,
        conversations: list[Conversation],
        images: Tensor | None,
        image_counts: list[int],
        for_generation: bool = False,
    ) -> VLMInputs:
        """See ``VLMBackbone.embed``; training pads on the right."""
        num_images = 0 if images is None else len(images)
        if len(image_counts) != len(conversations) or sum(image_counts) != num_images:
            raise ValueError(f"image_counts {image_counts} do not fit {len(conversations)} rows and {num_images} images")
        rows = [
            self._encode(row, conversation, count, for_generation)
            for row, (conversation, count) in enumerate(zip(conversations, image_counts, strict=True))
        ]
        image_id = self.config.image_token_id
        token_ids = pad([ids for ids, _ in rows], int(self.tokenizer.pad_token_id or 0), left=for_generation).to(self.device)
        labels = pad([row for _, row in rows], IGNORE, left=for_generation).to(self.device)
        mask = pad([[1] * len(ids) for ids, _ in rows], 0, left=for_generation).to(self.device).bool()
        image_mask = (token_ids == image_id) & mask
        embeddings = self._decoder.embed_tokens(token_ids.masked_fill(image_mask, 0))  # [B, L, D]; an image id may lie outside
        if images is not None and num_images:
            features = self.encode_images(images.to(self.device)).to(embeddings.dtype)  # [M, N, D]
            embeddings = embeddings.masked_scatter(image_mask[..., None], features)
        elif torch.is_grad_enabled() and any(p.requires_grad for p in self.projector.parameters()):
            # a batch without images must touch the same parameters on every rank
            blank = torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)
            embeddings = embeddings + 0 * self.encode_images(blank).sum().to(embeddings.dtype)
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return VLMInputs(token_ids, embeddings, mask, positions, labels, image_mask)

    def _encode(self, row: int, conversation: Conversation, num_images: int, for_generation: bool) -> tuple[list[int], list[int]]:
        markers = sum(turn["text"].count(IMAGE_MARKER) for turn in conversation if turn["role"] == "user")
        if markers != num_images:
            raise MistakeError(f"found {markers} {IMAGE_MARKER} markers in the user turns for {num_images} images", row)
        if for_generation and conversation and conversation[-1]["role"] == "assistant":
            raise MistakeError("found an assistant turn at the end, expected a question that is left to answer", row)
        pieces = self.template.render(conversation, for_generation)
        image_id = self.config.image_token_id
        ids, labels = encode(self.tokenizer, pieces, image_id, self.grid.num_cells)
        lost = ids[self.max_length :]
        if lost and (for_generation or image_id in lost):
            what = f"{lost.count(image_id)} image tokens" if image_id in lost else "the end of a question"
            raise MistakeError(
                f"found {len(ids)} tokens, of which max_length {self.max_length} would cut off {what}; "
                "expected shorter texts or a larger method.vlm.max_length",
                row,
            )
        return ids[: self.max_length], labels[: self.max_length]

    # -- the language model ------------------------------------------------------------------------------------------------------

    def _run(self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None = None) -> Tensor:
        if self.gradient_checkpointing:
            for layer in self._decoder.layers:  # the library recomputes in training mode only, which a frozen decoder never is in
                layer.training = cache is None and torch.is_grad_enabled()
        states = self._decoder(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return cast(Tensor, states.last_hidden_state)

    def forward(self, inputs: VLMInputs) -> VLMOutput:
        """Run the language model over the whole sequence; logits are formed only where there is a label."""
        hidden = self._run(inputs.embeddings, inputs.attention_mask, inputs.position_ids)  # [B, L, D]
        return VLMOutput(*language_loss(hidden, inputs.labels, self.language_model.lm_head), hidden)

    @torch.no_grad()
    def generate(
        self,
        conversations: list[Conversation],
        images: Tensor | None,
        image_counts: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """Answer B prompts with the KV cache, each image encoded once; temperature 0 is greedy."""
        inputs = self.embed(conversations, images, image_counts, for_generation=True)
        cache = DynamicCache(config=self.config.text_config)
        mask, last = inputs.attention_mask, inputs.position_ids[:, -1:]

        def logits_of(hidden: Tensor) -> Tensor:
            return cast(Tensor, self.language_model.lm_head(hidden[:, -1]))  # [B, vocabulary]

        def step(tokens: Tensor) -> Tensor:
            nonlocal mask, last
            mask, last = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), last + 1
            return logits_of(self._run(self._decoder.embed_tokens(tokens[:, None]), mask, last, cache))

        logits = logits_of(self._run(inputs.embeddings, mask, inputs.position_ids, cache))
        fill = int(self.tokenizer.pad_token_id or 0)
        tokens, kept, _ = decode(step, logits, self._stop_ids, fill, max_new_tokens, temperature, generator)
        rows = zip(tokens.cpu(), kept.cpu(), strict=True)
        return [str(self.tokenizer.decode(row[own].tolist(), skip_special_tokens=True)).strip() for row, own in rows]
