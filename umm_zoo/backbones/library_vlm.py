"""Vision-language models of the transformers library: what all families share, from conversations to losses and answers."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from umm_zoo.backbones.base import VLMBackbone, VLMInputs, VLMOutput, language_loss
from umm_zoo.backbones.generation import Samples, append_answers, decode, label_log_probs, last_position
from umm_zoo.backbones.prefix import Prefix, evaluation_mode
from umm_zoo.backbones.templates import IGNORE, Piece, encode, pad, stop_ids
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Grid, Images, stacked
from umm_zoo.errors import UserError

#: Bytes that a template adds to a turn, far more than any does (our choice): rows that are surely short are not tokenised twice.
_PER_TURN = 512
#: Encoded rows that are kept: those of a few batches.
_KEPT = 1024


def _is_learnt(labels: list[int]) -> bool:
    """Whether a row has anything to learn: the first token follows none."""
    return any(label != IGNORE for label in labels[1:])


class LibraryVLM(VLMBackbone):
    """A vision encoder whose tokens stand among the text embeddings of a causal language model.

    A subclass names the library's parts, and says how images become tokens and where tokens stand.

    Attributes:
        max_length: longest row in tokens; longer ones are cut on the right, never through an image. None cuts nothing.
        image_token_id: stands at the places of image tokens; it may lie outside the vocabulary.
    """

    max_length: int | None = None
    image_token_id: int

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""

    @property
    @abstractmethod
    def text_model(self) -> Any:
        """The library's language model without its output layer."""

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
    def encode_images(self, images: Tensor) -> Tensor:
        """Images ``[M, 3, H, W]`` in [-1, 1] to what enters the language model, ``[M, N, D]`` in raster order."""

    @abstractmethod
    def position_ids(self, token_ids: Tensor, attention_mask: Tensor, image_mask: Tensor, grid: Grid) -> Tensor:
        """Position ids of rows whose images all have one grid, ``[B, L]`` or ``[3, B, L]``; 0 on padding."""

    @property
    def token_embeddings(self) -> Tensor:
        """The embedding matrix, ``[vocabulary, D]``."""
        return cast(Tensor, self.text_model.embed_tokens.weight)

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
        num_images = 0 if images is None else len(images)
        if len(image_counts) != len(conversations) or sum(image_counts) != num_images:
            expected = f"{len(conversations)} numbers (conversations) with the sum {num_images} (images)"
            raise ValueError(f"image_counts: found {image_counts}, expected {expected}")
        grid = self._grid(images)
        rows = self._encode_all(conversations, image_counts, grid, for_generation, opening)
        token_ids = pad([ids for ids, _ in rows], self.pad_id, for_generation)
        labels = pad([labels for _, labels in rows], IGNORE, for_generation)
        attention_mask = pad([[1] * len(ids) for ids, _ in rows], 0, for_generation).bool()
        image_mask = (token_ids == self.image_token_id) & attention_mask
        position_ids = self.position_ids(token_ids, attention_mask, image_mask, grid)
        token_ids, labels, attention_mask, image_mask, position_ids = (
            tensor.to(self.device) for tensor in (token_ids, labels, attention_mask, image_mask, position_ids)
        )
        embeddings = self.text_model.embed_tokens(token_ids.masked_fill(image_mask, 0))  # [B, L, D]
        if images is not None and num_images:
            features = self.encode_images(stacked(images).to(self.device)).to(embeddings.dtype)  # [M, N, D]
            embeddings = embeddings.masked_scatter(image_mask[..., None], features)
        return VLMInputs(token_ids, embeddings, attention_mask, position_ids, labels, image_mask)

    def count_labels(self, batch: Batch) -> int:
        """See ``VLMBackbone.count_labels``; texts are tokenised, no network runs."""
        rows = self._encode_all(batch.conversations, batch.image_counts, self._grid(batch.images), for_generation=False)
        return sum(label != IGNORE for _, labels in rows for label in labels[1:])

    def check_rows(self, batch: Batch, for_generation: bool = False, opening: str = "") -> None:
        """See ``VLMBackbone.check_rows``; texts that may be too long are tokenised."""
        grid = self._grid(batch.images)
        conversations = batch.prompts() if for_generation else batch.conversations
        for row, (conversation, count) in enumerate(zip(conversations, batch.image_counts, strict=True)):
            most = sum(len(turn["text"].encode()) + _PER_TURN for turn in conversation) + len(opening.encode())
            if self.max_length is not None and most + count * grid.num_cells > self.max_length:  # no token is less than a byte
                self._encode(row, conversation, count, grid, for_generation, opening)

    def _grid(self, images: Images | None) -> Grid:
        return Grid(0, 0) if images is None or not len(images) else self.image_grid(*stacked(images).shape[-2:])

    def _encode_all(
        self, conversations: list[Conversation], image_counts: list[int], grid: Grid, for_generation: bool, opening: str = ""
    ) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of each row."""
        return [
            self._encode(row, conversation, count, grid, for_generation, opening)
            for row, (conversation, count) in enumerate(zip(conversations, image_counts, strict=True))
        ]

    @cached_property
    def _encoded(self) -> dict[Any, tuple[list[int], list[int]]]:
        """Rows encoded last, by their content: the loader asks whether a row fits before the step encodes it."""
        return {}

    def _encode(
        self, row: int, conversation: Conversation, num_images: int, grid: Grid, for_generation: bool, opening: str
    ) -> tuple[list[int], list[int]]:
        key = (tuple((turn["role"], turn["text"]) for turn in conversation), num_images, grid, for_generation, opening)
        known = self._encoded.get((key, self.max_length))
        if known is None:
            known = self._tokenise(row, conversation, num_images, grid, for_generation, opening)
            if len(self._encoded) >= _KEPT:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[key, self.max_length] = known
        return known

    def _tokenise(
        self, row: int, conversation: Conversation, num_images: int, grid: Grid, for_generation: bool, opening: str
    ) -> tuple[list[int], list[int]]:
        if for_generation and conversation and conversation[-1]["role"] == "assistant":
            raise UserError("", "an assistant turn at the end", "a question that is left to answer", row=row)
        pieces = [*self.template.render(conversation, for_generation), *([Piece("text", opening)] if opening else [])]
        markers = sum(piece.kind == "image" for piece in pieces)
        if markers != num_images:
            raise UserError("", f"{markers} {IMAGE_MARKER} markers", f"{num_images}, one for each image of the row", row=row)
        ids, labels = encode(self.tokenizer, pieces, self.image_token_id, grid.num_cells)
        lost = [] if self.max_length is None else ids[self.max_length :]
        if lost and (for_generation or self.image_token_id in lost):
            images = lost.count(self.image_token_id)
            what = f"{images} image tokens" if images else "the end of a question"
            found = f"{len(ids)} tokens, of which max_length {self.max_length} would cut off {what}"
            raise UserError("", found, "shorter texts or a larger method.vlm.max_length", row=row)
        if lost and _is_learnt(labels) and not _is_learnt(labels[: self.max_length]):
            found = f"{len(ids)} tokens, of which max_length {self.max_length} would cut off every answer"
            raise UserError("", found, "shorter texts or a larger method.vlm.max_length", row=row)
        places = getattr(self.text_model.config, "max_position_embeddings", None)
        if for_generation and places is not None and len(ids) > places:
            raise UserError("", f"{len(ids)} tokens", f"at most {places}, the positions of the language model", row=row)
        return ids[: self.max_length], labels[: self.max_length]

    # -- the language model --------------------------------------------------------------------------------------------------

    def run(self, embeddings: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Last hidden states ``[B, L, D]`` after the final norm; a cache is read and grows."""
        states = self.text_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return cast(Tensor, states.last_hidden_state)

    def forward(self, inputs: VLMInputs) -> VLMOutput:
        """Run the language model over the whole sequence; logits are formed only where there is a label."""
        hidden = self.run(inputs.embeddings, inputs.attention_mask, inputs.position_ids)  # [B, L, D]
        return VLMOutput(*language_loss(hidden, inputs.labels, self.lm_head), hidden)

    def log_probs(self, inputs: VLMInputs, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each labelled token, differentiable.

        Returns:
            (log_probs ``[B, L-1]``, entry i being that of token i + 1 and 0 without a label; mask ``[B, L-1]``).
        """
        hidden = self.run(inputs.embeddings, inputs.attention_mask, inputs.position_ids)
        return label_log_probs(hidden, inputs.labels, self.lm_head, temperature)

    @torch.no_grad()
    def prefix(self, inputs: VLMInputs) -> Prefix:
        """Encode a prompt once, keep its keys and values and no activations; evaluation mode, no gradient."""
        cache = DynamicCache(config=self.text_model.config)
        with evaluation_mode(self):
            hidden = self.run(inputs.embeddings, inputs.attention_mask, inputs.position_ids, cache)  # [B, L, D]
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = (inputs.attention_mask * places).argmax(dim=1)  # [B], last real token of either padding
        last_hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return Prefix(cache, inputs.attention_mask, last_position(inputs.position_ids) + 1, last_hidden)

    # -- answers -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_from(
        self,
        inputs: VLMInputs,
        num_samples: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Sample ``num_samples`` answers to each prompt embedded ``for_generation``; it is encoded once for its whole group."""
        prefix = self.prefix(inputs).repeat(num_samples)
        axes = inputs.position_ids.shape[:-2]  # none, or the three of M-RoPE
        mask, position = prefix.attention_mask, prefix.next_position[:, None]  # [R, 1]

        def step(tokens: Tensor) -> Tensor:
            nonlocal mask, position
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            embeddings, places = self.text_model.embed_tokens(tokens[:, None]), position.expand(*axes, -1, -1)
            position = position + 1
            return cast(Tensor, self.lm_head(self.run(embeddings, mask, places, prefix.cache)[:, -1]))

        with evaluation_mode(self):
            tokens, kept, log_probs = decode(
                step,
                self.lm_head(prefix.last_hidden),
                self.stop_ids,
                self.pad_id,
                max_new_tokens,
                temperature,
                generator,
            )
        rows = zip(tokens.cpu(), kept.cpu(), strict=True)
        texts = [str(self.tokenizer.decode(row[own].tolist(), skip_special_tokens=True)).strip() for row, own in rows]
        return Samples(tokens, kept, texts, log_probs)

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
        return append_answers(inputs, tokens, mask, self.text_model.embed_tokens(tokens))
