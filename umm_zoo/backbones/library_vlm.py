"""Vision-language models of the transformers library: what all families share, from conversations to losses and answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from umm_zoo.backbones.adapters import learns
from umm_zoo.backbones.base import VLMInputs, VLMOutput, before_labels, language_loss, places_of, put
from umm_zoo.backbones.by_shape import numbers
from umm_zoo.backbones.decoder_attention import run_decoder
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.encoding import pad, stop_ids
from umm_zoo.backbones.generation import Samples, append_answers, decode, label_log_probs, last_position, take_rows, token_log_probs
from umm_zoo.backbones.packing import PackedRows, assert_packs
from umm_zoo.backbones.prefix import Prefix, evaluation_mode
from umm_zoo.backbones.roomy_cache import with_room
from umm_zoo.backbones.row_tokeniser import RowTokeniser
from umm_zoo.backbones.templates import IGNORE
from umm_zoo.batch import Conversation, Grid, Images
from umm_zoo.objectives.step import blocks_are_sharded


class LibraryVLM(RowTokeniser):
    """A vision encoder whose tokens stand among the text embeddings of a causal language model.

    A subclass names the library's parts, and says how images become tokens and where tokens stand.

    Attributes:
        packs: whether rows of unequal lengths are packed, see ``pack_rows``.
    """

    packs = False

    @property
    @abstractmethod
    def lm_head(self) -> nn.Module:
        """The output layer."""

    @property
    def pad_id(self) -> int:
        """Id that fills rows."""
        return int(self.tokenizer.pad_token_id or 0)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_ids(self.tokenizer, self.template.end)

    @abstractmethod
    def encode_images(self, images: Images) -> list[Tensor]:
        """M images in [-1, 1] to what enters the language model, ``[N, D]`` of each in raster order; the tower runs once."""

    def image_features(self, images: Images, image_counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Image tokens ``[N, D]`` of all rows, and what they add behind layers, ``[N, K, D]`` (see ``VLMInputs.deepstack``)."""
        return torch.cat(self.encode_images(images)), None

    @abstractmethod
    def position_ids(self, token_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Position ids of rows whose images have these ``grids``, row after row: ``[B, L]`` or ``[3, B, L]``; 0 on padding."""

    @property
    def token_embeddings(self) -> Tensor:
        """The embedding matrix, ``[vocabulary, D]``."""
        return cast(Tensor, self.text_model.get_input_embeddings().weight)

    @property
    def device(self) -> torch.device:
        """Name of the token embeddings."""
        return self.token_embeddings.device

    def try_images(self, inputs: Tensor, targets: Tensor) -> None:
        """See ``outputs.TakesImages``."""
        blank = self.token_embeddings.new_zeros(1, 3, self.width)
        self.text_model(inputs_embeds=blank, attention_mask=blank.new_zeros(1, 1, 3, 3), use_cache=False)
        self.encode_images(inputs)

    # -- inputs --------------------------------------------------------------------------------------------------------------

    def embed(
        self,
        conversations: list[Conversation],
        images: Images | None,
        image_counts: list[int],
        for_generation: bool = False,
        opening: str = "",
    ) -> VLMInputs:
        """See ``VLMBackbone.embed``. Padding is on the right, for generation on the left."""
        shown: Images = [] if images is None else images
        if len(image_counts) != len(conversations) or sum(image_counts) != len(shown):
            expected = f"{len(conversations)} numbers (conversations) with the sum {len(shown)} (images)"
            raise ValueError(f"image_counts: found {image_counts}, expected {expected}")
        rows = self.encode_rows(conversations, self.image_layouts(shown, image_counts), for_generation, opening)
        token_ids = pad([row.ids for row in rows], self.pad_id, for_generation)
        labels = pad([row.labels for row in rows], IGNORE, for_generation)
        attention_mask = pad([row.ids * 0 + 1 for row in rows], 0, for_generation).bool()
        image_mask = (token_ids == self.image_token_id) & attention_mask
        position_ids = self.position_ids(token_ids, attention_mask, image_mask, self.image_grids(shown))
        image_places, label_places = places_of(image_mask), places_of(before_labels(labels))  # here, where nothing waits
        packs = self.packs and not for_generation and not bool(attention_mask.all())
        packed = PackedRows.of(attention_mask, self.text_model, self.device) if packs else None
        token_ids, labels, attention_mask, image_mask, position_ids, image_places, label_places = (
            send(tensor, self.device)
            for tensor in (token_ids, labels, attention_mask, image_mask, position_ids, image_places, label_places)
        )
        features, behind, deepstack = None, None, None
        if len(shown):  # the tower comes first, so that a language model that waits on the CPU comes once
            there = shown.to(self.device) if isinstance(shown, Tensor) else [image.to(self.device) for image in shown]
            features, behind = self.image_features(there, image_counts)  # [image tokens, D]
        embeddings = self.text_model.get_input_embeddings()(token_ids.masked_fill(image_mask, 0))  # [B, L, D]
        if features is not None:
            embeddings = put(embeddings, image_places, features)
            if behind is not None:
                deepstack = put(embeddings.new_zeros(*image_mask.shape, *behind.shape[1:]), image_places, behind)
        elif blocks_are_sharded() or (torch.is_grad_enabled() and self._learns_to_see):
            # a batch without images touches the same parameters, for ranks wait for each other's gradients and weights
            side = self.image_size or 64
            made = self.image_features([torch.zeros(3, side, side, device=self.device)], [1])
            embeddings = embeddings + sum(0 * part.sum().to(embeddings.dtype) for part in made if part is not None)
        padded = len({len(row.ids) for row in rows}) > 1
        whole = VLMInputs(token_ids, embeddings, attention_mask, position_ids, labels, image_mask, padded, deepstack)
        return replace(whole, image_places=image_places, label_places=label_places, packed=packed)

    @property
    def _learns_to_see(self) -> bool:
        return any(learns(self.parts()[name]) for name in ("vision_tower", "projector"))

    # -- the language model --------------------------------------------------------------------------------------------------

    @cached_property
    def _layers(self) -> list[Any]:
        return [layer for layer in self.text_model.modules() if isinstance(layer, GradientCheckpointingLayer)]

    def run(
        self, embeddings: Tensor, mask: Tensor | None, position_ids: Tensor, cache: DynamicCache | None = None, **extras: Any
    ) -> Tensor:
        """Last hidden states ``[B, L, D]`` after the final norm; no mask where nothing is padded; a cache is read and grows.

        ``extras`` are further arguments of the library's decoder.
        """
        for layer in self._layers:  # the library recomputes in training mode only, which a frozen one never is in
            if layer.gradient_checkpointing:
                layer.training = cache is None and torch.is_grad_enabled()
        return run_decoder(self.text_model, embeddings, mask, position_ids, cache, **extras)

    def run_whole(self, inputs: VLMInputs, cache: DynamicCache | None = None) -> Tensor:
        """``run`` over whole rows; packed, where they are to be, without their padding."""
        if inputs.packed is None or cache is not None:
            return self.run(inputs.embeddings, cache=cache, **self.arguments(inputs, cache))
        packed: PackedRows = inputs.packed
        one = packed.pack(inputs)
        return packed.unpack(self.run(one.embeddings, **self.arguments(one, None), packed=packed), inputs)

    def arguments(self, inputs: VLMInputs, cache: DynamicCache | None) -> dict[str, Any]:
        """Of ``run`` over whole rows; a subclass adds what its decoder asks of the images in them."""
        return {"mask": inputs.mask, "position_ids": inputs.position_ids}

    def pack_rows(self) -> None:
        """See ``VLMBackbone.pack_rows``."""
        assert_packs(self.text_model)
        self.packs = True

    def forward(self, inputs: VLMInputs) -> VLMOutput:
        """Run the language model over the whole sequence; logits are formed only where there is a label."""
        hidden = self.run_whole(inputs)  # [B, L, D]
        return VLMOutput(*language_loss(hidden, inputs.labels, self.lm_head, inputs.label_places), hidden)

    def log_probs(self, inputs: VLMInputs, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each labelled token, differentiable.

        Returns:
            (log_probs ``[B, L-1]``, entry i being that of token i + 1 and 0 without a label; mask ``[B, L-1]``).
        """
        hidden = self.run_whole(inputs)
        return label_log_probs(hidden, inputs.labels, self.lm_head, temperature)

    def answer_log_probs(self, inputs: VLMInputs, tokens: Tensor, mask: Tensor, owners: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability of each token of R answers, ``[R, T]``, 0 outside the mask, differentiable.

        A prompt is run once for all its answers, unless layers are computed again in the backward pass, which no cache outlives.

        Args:
            inputs: B prompts embedded ``for_generation``.
            tokens, mask: ``[R, T]`` as in ``Samples``.
            owners: ``[R]``, the prompt of each answer.
            temperature: divides the logits, as sampling did.
        """
        if any(layer.gradient_checkpointing for layer in self._layers):
            found, _ = self.log_probs(self.with_answers(take_rows(inputs, owners), tokens, mask), temperature)
            return found[:, -tokens.shape[1] :]  # entry i is that of token i + 1, and the tokens are the last of the sequence
        prefix = self._prefix(inputs).select(owners)
        states = prefix.last_hidden[:, None]
        if known := tokens.shape[1] - 1:
            embeddings = self.text_model.get_input_embeddings()(tokens[:, :known])
            places = prefix.text_positions(known) if inputs.position_ids.ndim == 3 else prefix.text_positions(known)[0]
            seen = torch.cat([prefix.attention_mask, mask[:, :known]], dim=1)
            states = torch.cat([states, self.run(embeddings, seen, places, prefix.cache)], dim=1)  # [R, T, D]
        return token_log_probs(states, tokens, mask, self.lm_head, temperature)

    @torch.no_grad()
    def prefix(self, inputs: VLMInputs) -> Prefix:
        """Encode a prompt once, keep its keys and values and no activations; evaluation mode, no gradient.

        All keys are kept, those behind a sliding window too: what comes later may stand in the place of earlier tokens.
        """
        with evaluation_mode(self):
            return self._prefix(inputs)

    def _prefix(self, inputs: VLMInputs) -> Prefix:
        """``prefix`` in whatever mode the model is in; with a graph where there are gradients."""
        cache = DynamicCache()
        hidden = self.run_whole(inputs, cache)  # [B, L, D]
        places = numbers(hidden.device, hidden.shape[1])
        last = (inputs.attention_mask * places).argmax(dim=1)  # [B], last real token of either padding
        last_hidden = hidden[numbers(hidden.device, len(hidden)), last]
        next_position, plain = last_position(inputs.position_ids) + 1, inputs.position_ids.ndim == 2
        return Prefix(cache, inputs.attention_mask, next_position, last_hidden, inputs.padded, plain)

    # -- answers -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_from(
        self,
        inputs: VLMInputs,
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **further: Any,
    ) -> Samples:
        """Sample ``num_samples`` answers to each prompt embedded ``for_generation``; it is encoded once for its whole group.

        The arguments after the second are those of ``generation.decode``.
        """
        prefix = self.prefix(inputs).repeat(num_samples)
        prefix = replace(prefix, cache=with_room(prefix.cache))
        axes = inputs.position_ids.shape[:-2]  # none, or the three of M-RoPE
        mask, position = prefix.attention_mask, prefix.next_position[:, None]  # [R, 1]

        def step(tokens: Tensor) -> Tensor:
            nonlocal mask, position
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            embeddings, places = self.text_model.get_input_embeddings()(tokens[:, None]), position.expand(*axes, -1, -1)
            position = position + 1
            known = mask if prefix.padded else None
            return cast(Tensor, self.lm_head(self.run(embeddings, known, places, prefix.cache)[:, -1]))

        with evaluation_mode(self):
            how = self.stop_ids, self.pad_id, max_new_tokens, temperature, generator
            tokens, kept, log_probs = decode(step, self.lm_head(prefix.last_hidden), *how, **further)
        texts = [self.text_of(row[own].tolist()).strip() for row, own in zip(tokens.cpu(), kept.cpu(), strict=True)]
        return Samples(tokens, kept, texts, log_probs)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, without special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def sample(
        self,
        conversations: list[Conversation],
        images: Images | None,
        image_counts: list[int],
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Sample ``num_samples`` answers to each of B prompts, as groups of rows; see ``Samples``."""
        with torch.no_grad(), evaluation_mode(self):
            inputs = self.embed(conversations, images, image_counts, for_generation=True)
        return self.sample_from(inputs, num_samples, max_new_tokens, temperature, generator)

    def generate(
        self,
        conversations: list[Conversation],
        images: Images | None,
        image_counts: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """Answer B prompts with the KV cache, each image encoded once; temperature 0 is greedy."""
        return self.sample(conversations, images, image_counts, 1, max_new_tokens, temperature, generator).texts

    def with_answers(self, inputs: VLMInputs, tokens: Tensor, mask: Tensor) -> VLMInputs:
        """Prompts embedded ``for_generation`` with sampled answers behind them as labels, for ``log_probs`` or ``forward``.

        Args:
            inputs: B prompts.
            tokens, mask: ``[B * G, T]`` of ``Samples``.
        """
        return append_answers(inputs, tokens, mask, self.text_model.get_input_embeddings()(tokens))
