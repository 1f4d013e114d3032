"""Janus through transformers: reads images with a vision tower, generates their tokens with a head beside the language model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import JanusConfig, JanusForConditionalGeneration
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from umm_zoo.backbones import by_shape
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.encoding import encode_all, pad
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.generation import append_answers, join_rows
from umm_zoo.backbones.image_sampling import Step, distinct, draw_token, in_turn, put, take, uniforms
from umm_zoo.backbones.janus_loading import janus_around, janus_config, load_janus, new_janus, pixel_statistics
from umm_zoo.backbones.janus_vq import JanusVQ
from umm_zoo.backbones.llava_loading import Dtype
from umm_zoo.backbones.loading import assert_stated, checked_config, find_source, on_meta_device
from umm_zoo.backbones.prefix import evaluation_mode
from umm_zoo.backbones.square_vlm import SquareVLM
from umm_zoo.backbones.static_decoder import StaticDecoder
from umm_zoo.backbones.templates import IGNORE, ChatTemplate, JanusChat, QwenChat
from umm_zoo.backbones.token_codec import TokenCodec
from umm_zoo.backbones.tokenizer import tokenizer_source
from umm_zoo.backbones.unified import ImageSamples, PaddedPrompt, Unconditional, UnifiedAR
from umm_zoo.blocks.code_heads import CodeEmbeddings, CodeHead, assert_head
from umm_zoo.errors import Count, UserError


class Janus(SquareVLM, UnifiedAR):
    """Janus and Janus-Pro (Wu et al., arXiv 2410.13848; Chen et al., arXiv 2501.17811): one causal language model, two encoders.

    Images are read through a tower and a projector. To generate one, the language model goes on behind a prompt with image tokens,
    which have embeddings and an output head of their own, and no positions but the running index. Build it with ``from_config``
    (random weights) or ``from_pretrained``.

    Args:
        model: the library's model; without its image tokenizer where ``codec`` is another one.
        codec: makes image tokens, frozen; None is the model's own.
        tokenizer: name or folder, None for the shipped one.
        template: None is ``JanusChat()``, or ``QwenChat(None)`` where the tokenizer has no ``<begin_of_image>``: the shipped one.
        unconditional: prompt beside which guidance puts the real one; None is ``PaddedPrompt()``.
        max_length: longest row in tokens; longer ones are cut on the right, never through an image or a prompt for one.
        gradient_checkpointing: recompute the layers of the language model in the backward pass instead of storing them.
        source: whose processor says the mean and deviation of pixels; None is the releases' .5.
        head: over the codes of a token, in place of the library's, for a codec with several; tokens are then embedded by
            ``CodeEmbeddings``.

    Raises:
        ValueError: a template without a token that opens an image; a codec without codes; a head that does not fit.
    """

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        codec: TokenCodec | None = None,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        unconditional: Unconditional | None = None,
        max_length: Count = 2048,
        gradient_checkpointing: bool = False,
        source: str | None = None,
        head: CodeHead | None = None,
    ) -> None:
        whole: Any = model.model
        parts = (whole.vision_model, whole.aligner, whole.language_model, model.lm_head)
        size, form = cast(Any, model.config.vision_config).image_size, template or JanusChat()
        if not form.around_image:
            raise ValueError(f"template: found {type(form).__name__}, expected one that opens an image, such as JanusChat")
        super().__init__(model, parts, pixel_statistics(size, source), tokenizer, form, max_length, gradient_checkpointing)
        if template is None and not on_meta_device() and form.around_image[0].text not in self.tokenizer.get_vocab():
            self.template = QwenChat(None)
        self.image_embeddings: nn.Module = whole.generation_embeddings
        self.image_projector: nn.Module = whole.generation_aligner
        self.image_head: nn.Module = whole.generation_head
        self.codec = freeze(JanusVQ(whole.vqmodel) if codec is None else codec)
        assert_head(head, self.codec.code_sizes, model.lm_head.in_features)
        if head is not None:
            dtype = model.lm_head.weight.dtype
            self.image_head = head.to(dtype)
            self.image_embeddings = CodeEmbeddings(head.sizes, whole.generation_embeddings.embedding_dim).to(dtype)
        self.codec.token_grid(size, size)  # refuses a side that is no multiple of its cells
        self.generated_size, self.form = size, unconditional or PaddedPrompt()
        self.grow_image_tokens()

    def grow_image_tokens(self) -> None:
        """Add what a subclass needs beside the image tokens of the release; nothing here."""

    # -- construction --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        codec: TokenCodec | None = None,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        unconditional: Unconditional | None = None,
        max_length: Count = 2048,
        dtype: Dtype = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        head: CodeHead | None = None,
        language_model: str | None = None,
    ) -> Janus:
        """Random weights of any size, but of a language model that is named.

        Args:
            config: fields of the library's ``JanusConfig``: ``vision_config``, ``text_config`` (with ``model_type: llama``, unless
                ``language_model`` is named) and ``vq_config``, of which another codec leaves ``embed_dim`` alone. The widths of
                what enters the language model need not be stated.
            codec, tokenizer, template, unconditional, max_length, gradient_checkpointing, head: see the class.
            dtype: of the weights.
            attention: ``sdpa``, ``flex_attention``, ``eager``, ``flash_attention_2`` …
            language_model: name or folder of a Llama, or of a LLaVA with one, that the language model begins as; its tokenizer is
                the one to name in ``tokenizer``, unless it is the shipped one.

        Raises:
            ValueError: an unknown field, or sizes that do not fit each other.
        """
        codes = None if codec is None else codec.num_codes
        if language_model is None:
            model = new_janus(janus_config(config, tokenizer is None, codes), dtype, attention, codes)
        else:
            model = janus_around(language_model, config, tokenizer is None, dtype, attention, codes)
        return cls(model, codec, tokenizer, template, unconditional, max_length, gradient_checkpointing, head=head)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        config: dict[str, Any] | None = None,
        codec: TokenCodec | None = None,
        tokenizer: str | None = None,
        template: ChatTemplate | None = None,
        unconditional: Unconditional | None = None,
        max_length: Count = 2048,
        dtype: Dtype = "auto",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        head: CodeHead | None = None,
    ) -> Janus:
        """A whole model in the library's format.

        Args:
            source: name or folder, such as ``deepseek-community/Janus-Pro-1B``.
            config: what the checkpoint is expected to be; on the meta device it is used in its place and nothing is read.
            codec: None is the checkpoint's own.
            tokenizer: None is the checkpoint's own, or the shipped one where a folder has none.
            template, unconditional, max_length, gradient_checkpointing, head: see the class.
            dtype: ``auto`` is the checkpoint's own.
            attention: see ``from_config``.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: tensors are missing, unexpected or of another shape; the configuration is not the one stated.
        """
        source, codes = find_source(source, JanusForConditionalGeneration), None if codec is None else codec.num_codes
        tokenizer = tokenizer_source(source, tokenizer)
        if on_meta_device():
            if config is None:
                found: Any = checked_config(JanusForConditionalGeneration, source)
                found = found or JanusConfig.from_pretrained(source)
            else:
                unread = {"image_token_id": JanusConfig().image_token_id}  # only the tokenizer knows it
                found = janus_config(unread | config, tokenizer is None, codes)
            model = new_janus(found, dtype, attention, codes)
            return cls(model, codec, tokenizer, template, unconditional, max_length, gradient_checkpointing, head=head)
        model = load_janus(source, dtype, attention, config, codes)
        assert_stated(source, config, model.config)
        return cls(model, codec, tokenizer, template, unconditional, max_length, gradient_checkpointing, source, head)

    def save(self, folder: str | Path) -> None:
        """Write model, tokenizer and image processor in the library's format; a codec of another kind stays where it came from.

        Raises:
            ValueError: another head than the library's.
        """
        if isinstance(self.image_head, CodeHead):
            found = f"a {type(self.image_head).__name__}, which the library's format has no place for"
            raise ValueError(f"Janus.save: found {found}, expected the library's head")
        super().save(folder)
        side = {"height": self.image_size, "width": self.image_size}
        mean, std = self.image_mean.flatten().tolist(), self.image_std.flatten().tolist()
        smallest = min(self.image_size, JanusImageProcessorPil.min_size)  # the processor makes no image smaller than that
        JanusImageProcessorPil(size=side, image_mean=mean, image_std=std, min_size=smallest).save_pretrained(folder)

    # -- structure -----------------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """Those of reading (``language_model`` from embeddings to ``lm_head``), then those of image tokens."""
        own = {"image_embeddings": self.image_embeddings, "image_projector": self.image_projector, "image_head": self.image_head}
        return {**super().parts(), **own, "codec": self.codec}

    def tower_features(self, pixels: Tensor) -> Tensor:
        """The last layer's states after the tower's norm."""
        return cast(Tensor, self.vision_tower(pixels).last_hidden_state)

    # -- image tokens --------------------------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        """As the base class."""
        return cast(int, self.config.text_config.vocab_size)

    def image_prompt(self, texts: Sequence[str]) -> VLMInputs:
        """As the base class."""
        rows = self._prompt_ids(texts)
        mask = pad([[1] * len(ids) for ids in rows], 0, left=True).bool()
        padded = not bool(mask.all())
        return self._prompt(send(pad(rows, self.pad_id, left=True), self.device), send(mask, self.device), padded)

    def check_image_prompts(self, texts: Sequence[str]) -> None:
        """As the base class."""
        self._prompt_ids(texts)

    def _prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        limit, length = self.config.text_config.max_position_embeddings, self.generated_grid.num_cells
        pieces, first = [self.template.image_prompt(text) for text in texts], self.template.first_ids(self.tokenizer)
        rows = [ids.tolist() for ids, _ in encode_all(self.tokenizer, pieces, self.image_token_id, [()] * len(texts), first)]
        for row, ids in enumerate(rows):
            if len(ids) + length > limit:
                found, places = f"{len(ids)} tokens", f"{limit} positions of the language model and {length} image tokens"
                raise UserError("", found, f"at most {limit - length} in a prompt for an image ({places})", row=row)
        return rows

    def unconditional(self, inputs: VLMInputs) -> VLMInputs:
        """As the base class."""
        return self._prompt(*self.form(inputs.token_ids, inputs.attention_mask, self.pad_id, self.tokenizer.bos_token_id))

    def _prompt(self, ids: Tensor, mask: Tensor, padded: bool = True) -> VLMInputs:
        none = torch.zeros_like(mask)
        places = self.position_ids(ids, mask, none, ())
        return VLMInputs(ids, self.text_model.embed_tokens(ids), mask, places, torch.full_like(ids, IGNORE), none, padded)

    def embed_image(self, ids: Tensor) -> Tensor:
        """Image tokens as the language model takes them, ``[...]``, or ``[..., D]`` of several codes, to ``[..., width]``."""
        return cast(Tensor, self.image_projector(self.image_embeddings(ids)))

    def _codes(self, ids: Tensor) -> Tensor:
        """Ids ``[R, N * D]`` by token, as ``embed_image`` takes them."""
        return ids.unflatten(1, (-1, self.codes_per_token)) if isinstance(self.image_head, CodeHead) else ids

    def image_logits(self, inputs: VLMInputs, ids: Tensor) -> Tensor:
        """As the base class."""
        length, codes = inputs.token_ids.shape[1], self._codes(ids)
        known = codes[:, :-1]  # nothing follows the last token
        first = known if known.ndim == 2 else known[..., 0]
        whole = append_answers(inputs, first, torch.ones_like(first, dtype=torch.bool), self.embed_image(known))
        hidden = self.run(whole.embeddings, whole.attention_mask if inputs.padded else None, whole.position_ids)
        states = hidden[:, length - 1 :]
        if isinstance(self.image_head, CodeHead):
            logits: Tensor = self.image_head(states.flatten(0, 1), codes.flatten(0, 1))
            return logits.unflatten(0, tuple(codes.shape[:2])).flatten(1, 2)
        return cast(Tensor, self.image_head(states))

    @torch.no_grad()
    def sample_image(
        self,
        inputs: VLMInputs,
        seeds: Sequence[int],
        scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> ImageSamples:
        """As the base class; equal prompts are encoded once, and no number of a token goes to the host."""
        group, rest = divmod(len(seeds), len(inputs.token_ids))
        if rest or not group:
            raise ValueError(f"sample_image: found {len(seeds)} seeds, expected a multiple of {len(inputs.token_ids)} prompts")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"sample_image: found temperature {temperature} and top_k {top_k}, expected 0 or more and 1 or more")
        length, with_guidance, codes = self.generated_grid.num_cells, scale != 1, self.codec.num_codes
        several = isinstance(self.image_head, CodeHead)
        chances = uniforms(seeds, length * self.codes_per_token).to(self.device).unflatten(1, (length, -1))  # [R, N, D]
        ids, probs = torch.empty_like(chances, dtype=torch.long), torch.empty_like(chances, dtype=torch.float)
        with evaluation_mode(self):
            rows = join_rows(inputs, self.unconditional(inputs)) if with_guidance else inputs
            numbers, places = distinct(rows)
            decoder = StaticDecoder(self.text_model, rows.attention_mask[numbers], places.repeat_interleave(group), length)
            first = decoder.encode(rows.embeddings[numbers])
            hidden = first.clone()
            table = None if several or codes > ids.numel() else self.embed_image(by_shape.numbers(self.device, codes))

            def advance(step: Step) -> None:
                drawn, likely = draw_token(self.image_head, hidden, take(chances, step), scale, temperature, top_k)
                put(ids, drawn, step)
                put(probs, likely, step)
                if step != length - 1 or isinstance(step, Tensor):  # nothing follows the last token
                    own = drawn if several else drawn[:, 0]
                    embedded = self.embed_image(own) if table is None else table[own]
                    hidden.copy_(decoder(torch.cat([embedded, embedded]) if with_guidance else embedded, step))

            in_turn(advance, length, self.device, lambda: hidden.copy_(first))
        return ImageSamples(ids.flatten(1), probs.log().flatten(1))
