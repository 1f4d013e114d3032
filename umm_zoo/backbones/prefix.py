"""A frozen model's reading of a prompt, kept as keys and values for whatever is to attend to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache


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
    """

    cache: DynamicCache
    attention_mask: Tensor
    next_position: Tensor
    last_hidden: Tensor

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

    def mask_with(self, mask: Tensor) -> Tensor:
        """Which keys N new tokens may attend to: the whole prompt but its padding, and each other as ``mask`` says.

        Shape:
            - mask: ``[B, N, N]`` bool, True where the row may attend to the column.
            - output: ``[B, 1, N, L + N]`` bool.
        """
        prompt = self.attention_mask[:, None].expand(-1, mask.shape[1], -1)
        return torch.cat([prompt, mask], dim=-1)[:, None]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block, whatever the mode of each sub-module before and after.

    Dropout must be off while a prompt is read or an answer drawn; and the library's gradient checkpointing, on in training mode
    only, throws the KV cache away.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
