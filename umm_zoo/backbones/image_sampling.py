"""Sampling of image tokens: random numbers of one row each, and a decoder with keys and values in buffers of their final size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.prefix import Prefix


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Numbers in [0, 1) of each row's own generator, ``[R, length]`` in float64 on the CPU."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse of the distribution function.

    Args:
        logits: ``[R, K]``.
        uniform: ``[R]`` in [0, 1).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only that many of the likeliest tokens are drawn; None is all of them.

    Returns:
        (ids ``[R]``, the probability ``[R]`` of each; at temperature 0 that of temperature 1).
    """
    logits = logits.float() / (temperature or 1.0)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    chances = logits.softmax(-1)
    if temperature == 0:
        ids = chances.argmax(-1, keepdim=True)
    else:
        cumulative = chances.cumsum(-1, dtype=torch.float64)
        ids = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return ids[:, 0], chances.gather(1, ids)[:, 0]


class StaticDecoder:
    """The layers of a Llama for one new token of every row at a time; nothing grows and nothing is concatenated.

    The linear layers are called as modules, so that an adapter's additions count.

    Args:
        model: the library's decoder.
        prefix: B encoded prompts.
        group: rows per prompt, next to each other: R = B * group.
        length: tokens that will come.
    """

    def __init__(self, model: Any, prefix: Prefix, group: int, length: int) -> None:
        self.layers, self.norm, self.start = model.layers, model.norm, prefix.attention_mask.shape[1]
        layers: list[Any] = list(prefix.cache.layers)
        self.cache = [tuple(_room(part, group, length) for part in (layer.keys, layer.values)) for layer in layers]
        mask = prefix.attention_mask.repeat_interleave(group, 0)
        self.mask = None if bool(mask.all()) else F.pad(mask, (0, length), value=True)[:, None, None]  # [R, 1, 1, L + length]
        places = prefix.next_position.repeat_interleave(group, 0)[:, None] + torch.arange(length, device=mask.device)
        cos, sin = model.rotary_emb(prefix.last_hidden, places)  # [R, length, head dim]
        half = sin.shape[-1] // 2
        self.cos, self.sin = cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]

    def __call__(self, states: Tensor, step: int) -> Tensor:
        """States ``[R, D]`` of the tokens of that step, counted from 0, to those after the final norm."""
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            states = states + self._attend(layer.self_attn, layer.input_layernorm(states), keys, values, step)
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        return self.norm(states)

    def _attend(self, attention: Any, states: Tensor, keys: Tensor, values: Tensor, step: int) -> Tensor:
        end, width = self.start + step + 1, attention.head_dim
        query = self._turn(attention.q_proj(states).unflatten(-1, (-1, width)), step)  # [R, heads, head dim]
        keys[:, :, end - 1] = self._turn(attention.k_proj(states).unflatten(-1, (-1, width)), step)
        values[:, :, end - 1] = attention.v_proj(states).unflatten(-1, (-1, width))
        mixed = F.scaled_dot_product_attention(
            query[:, :, None],
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=None if self.mask is None else self.mask[..., :end],
            scale=attention.scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        return attention.o_proj(mixed.flatten(1))

    def _turn(self, heads: Tensor, step: int) -> Tensor:
        """Rotary positions."""
        return heads * self.cos[:, step] + heads.roll(heads.shape[-1] // 2, -1) * self.sin[:, step]


def _room(part: Tensor, group: int, length: int) -> Tensor:
    """Keys or values ``[B, KV heads, L, head dim]`` of every row of a group, with places for ``length`` more."""
    return F.pad(part.repeat_interleave(group, 0), (0, 0, 0, length))
