"""Prompts encoded once, kept as keys and values, and the layers of tokens that attend to them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from umm_zoo.backbones.base import VLMBackbone, VLMInputs
from umm_zoo.backbones.by_shape import numbers
from umm_zoo.backbones.mrope import grid_places
from umm_zoo.backbones.precision import ExactBuffers
from umm_zoo.batch import Grid


@dataclass
class Prefix:
    """The KV cache of a prompt and what is needed to go on from it. Holds no graph and no activations but ``last_hidden``.

    A call of the language model with ``past_key_values`` appends to the cache *in place* (even with ``use_cache=False``), so every
    user takes its own ``copy()``; that is free, for appending makes new tensors and the copies share the old ones.

    Shape:
        - cache: per layer keys and values ``[B, KV heads, L, head dim]``.
        - attention_mask: ``[B, L]`` bool, False on padding: those keys must stay masked.
        - next_position: ``[B]`` long, one past the largest position id of the row: where the next text token or grid begins.
        - last_hidden: ``[B, D]``, state of the last real token after the final norm; gives the logits of the first answer token.

    Attributes:
        padded: whether rows may hold padding, see ``VLMInputs``.
        plain_positions: whether positions are the running index, also those of an image's tokens: the model has no M-RoPE.
    """

    cache: DynamicCache
    attention_mask: Tensor
    next_position: Tensor
    last_hidden: Tensor
    padded: bool = True
    plain_positions: bool = False

    def copy(self) -> Prefix:
        """One that can be appended to without this one growing."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return replace(self, cache=cache)

    def repeat(self, times: int) -> Prefix:
        """Every row ``times`` times, copies next to each other (a group of answers to one prompt)."""
        repeated = self.copy()
        repeated.cache.batch_repeat_interleave(times)
        return replace(
            repeated,
            attention_mask=self.attention_mask.repeat_interleave(times, 0),
            next_position=self.next_position.repeat_interleave(times, 0),
            last_hidden=self.last_hidden.repeat_interleave(times, 0),
        )

    def select(self, rows: Tensor) -> Prefix:
        """The rows of these numbers ``[m]``."""
        chosen = self.copy()
        chosen.cache.batch_select_indices(rows)
        others = {name: getattr(self, name)[rows] for name in ("attention_mask", "next_position", "last_hidden")}
        return replace(chosen, **others)

    def text_positions(self, num_tokens: int) -> Tensor:
        """M-RoPE ids ``[3, B, N]`` of text behind the prompt: all three the running index."""
        return (self.next_position[:, None] + numbers(self.next_position.device, num_tokens)).expand(3, -1, -1)

    def grid_positions(self, grid: Grid) -> Tensor:
        """M-RoPE ids ``[3, B, h*w]`` of a token grid behind the prompt, as if one more image stood there."""
        if self.plain_positions:
            return self.text_positions(grid.num_cells)
        return self.next_position[:, None] + grid_places(self.next_position.device, grid)[:, None]

    def mask_with(self, mask: Tensor) -> Tensor:
        """Which keys N new tokens may attend to: the whole prompt but its padding, and each other as ``mask`` says.

        Shape:
            - mask: ``[B, N, N]`` bool, True where the row may attend to the column.
            - output: ``[B, 1, N, L + N]`` bool.
        """
        prompt = self.attention_mask[:, None].expand(-1, mask.shape[1], -1)
        return torch.cat([prompt, mask], dim=-1)[:, None]


class LanguageStack(ExactBuffers, ABC):
    """The layers and the final norm of a language model, without its embeddings, for tokens that attend to a prefix.

    The prefix is constant: nothing is appended to it, and gradients reach the tokens and the layers, never the prompt.

    Attributes:
        width: language-model width D.

    Shape:
        - tokens: ``[B, N, D]``; position_ids: ``[3, B, N]``
        - mask: ``[B, N, N]`` bool, True where the row may attend to the column, None where all may attend to all; all may attend
          to the whole prompt
        - output: ``[B, N, D]``, after the final norm
    """

    width: int

    @abstractmethod
    def forward(
        self, tokens: Tensor, prefix: Prefix, position_ids: Tensor, mask: Tensor | None, gradient_checkpointing: bool = False
    ) -> Tensor:
        """Run; with ``gradient_checkpointing`` the layers are computed again in the backward pass instead of being stored."""

    @abstractmethod
    def attention(self, tokens: Tensor, prefix: Prefix, position_ids: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """The attention weights of layer after layer, ``[B, heads, N, L + N]``; no gradient."""

    def keys_only(self) -> AbstractContextManager[None]:
        """The time in which no states after the layers are read, only their keys and values: the rest may be left out."""
        return nullcontext()

    @abstractmethod
    def example_prefix(self, batch_size: int, length: int) -> Prefix:
        """A prefix of random keys and values, for ``umm_zoo.testing.check_block``."""


class PrefixBackbone(VLMBackbone, ABC):
    """A vision-language model that encodes a prompt once and lets other tokens go on from it."""

    @abstractmethod
    def prefix(self, inputs: VLMInputs) -> Prefix:
        """Encode a prompt once, keep its keys and values and no activations; evaluation mode, no gradient."""

    def keys(self, inputs: VLMInputs) -> Prefix:
        """``prefix`` for tokens that attend to it and for no answer: its ``last_hidden`` is no number, nor computed."""
        with self.language_stack(copied=False).keys_only():
            made = self.prefix(inputs)
        return replace(made, last_hidden=torch.full_like(made.last_hidden, torch.nan))

    @property
    @abstractmethod
    def token_embeddings(self) -> Tensor:
        """The embedding matrix ``[vocabulary, D]``, new words go by it."""

    @abstractmethod
    def language_stack(self, copied: bool) -> LanguageStack:
        """The model's own layers, or a trainable copy of them that shares nothing."""


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block, whatever the mode of each sub-module before and after.

    Dropout must be off while a prompt is encoded or an answer sampled; and the library's gradient checkpointing, on in training
    mode only, throws the KV cache away.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
