"""Injection of image features into a diffusion transformer: an extra pair of key and value in every joint or self-attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.recomputing import switched
from umm_zoo.blocks.resampler import PerceiverResampler
from umm_zoo.errors import Weight


class FeatureInjection(nn.Module):
    """Adapter by which the image tokens of a frozen diffusion transformer attend to the features of an image, beside the text.

    A ``resampler`` makes a few tokens of the features; in every attention whose queries are the image's own, a key (RMS-normed per
    head without weights) and a value of them are attended to by the same queries, before rotary positions, and the outcome is added
    to that of the attention with weight ``scale``, before its output layer. (In FLUX's single blocks text and image are one
    sequence: there the queries of the text attend too, as in the release.) With scale 0, or without features, the network is bit
    for bit what it was.

    It stands beside the network and not in it, as ``LoRA`` does. The last linear layer is not zero in the release (its training is
    not published); here values start at zero unless said, so that an untrained adapter changes nothing (our choice).

    Reference: "Forge-and-Quench" (arXiv 2601.04706) and its released code.

    Args:
        resampler: 16 queries and depth 4 in the release.
        scale: .5 with FLUX.1-dev, .35 with LongCat-Image.
        zero_values: whether values start at zero.
    """

    def __init__(self, resampler: PerceiverResampler, scale: Weight = 0.5, zero_values: bool = True) -> None:
        super().__init__()
        self.resampler, self.scale, self.zero_values = resampler, scale, zero_values
        self.layers = nn.ModuleDict()
        self._tokens: Tensor | None = None  # of the features at hand, resampled

    def attach(self, decoder: ImageDecoder) -> None:
        """Stand beside the attentions of a decoder from now on.

        Raises:
            ValueError: it is attached already, or no attention has the form that diffusers gives it (``to_q``, ``to_k``).
        """
        if len(self.layers):
            raise ValueError("FeatureInjection.attach: found one that is attached already, expected a new one")
        for name, module in decoder.model.named_modules():
            if _attends_to_itself(module):
                pair = _KeyValue(self.resampler.out_dim, module.to_q.out_features, module.heads, self.zero_values)
                self.layers[name.replace(".", "/")] = pair
                _Beside(self, pair, module)
        if not len(self.layers):
            found = type(decoder.model).__name__
            raise ValueError(
                f"FeatureInjection.attach: found a {found} without such attentions, expected to_q and to_k of diffusers"
            )

    @contextmanager
    def features(self, features: Tensor | None) -> Iterator[None]:
        """The time in which the decoder sees features ``[B, N, D]`` of as many rows as its latents; None: none.

        Latents of K * B rows are those of K branches of guidance, one behind the other: each branch sees the same.
        """
        with switched(self, "_tokens", None if features is None else self._resampled(features)):
            yield

    def _resampled(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.resampler(features.to(self.resampler.proj_in.weight.dtype))
        return tokens

    @property
    def tokens(self) -> Tensor | None:
        """What is attended to, ``[B, Q, E]``; None where nothing is to be added."""
        return self._tokens if self.scale else None


class _KeyValue(nn.Module):
    """The extra pair of one attention."""

    def __init__(self, in_dim: int, width: int, num_heads: int, zero_values: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.faq_adapter_to_k, self.faq_adapter_to_v = nn.Linear(in_dim, width), nn.Linear(in_dim, width)
        if zero_values:
            nn.init.zeros_(self.faq_adapter_to_v.weight)
            nn.init.zeros_(self.faq_adapter_to_v.bias)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """``[B, N, width]`` of normed queries ``[B, heads, N, d]`` and tokens ``[B, Q, E]``."""
        keys, values = (self._heads(layer(tokens)) for layer in (self.faq_adapter_to_k, self.faq_adapter_to_v))
        keys = F.rms_norm(keys, keys.shape[-1:], eps=1e-5)
        return F.scaled_dot_product_attention(queries, keys.to(queries), values.to(queries)).transpose(1, 2).flatten(2)

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class _Beside:
    """Hooks of one attention of the library: its queries are kept as they are made, and the outcome is added before ``to_out``."""

    def __init__(self, adapter: FeatureInjection, pair: _KeyValue, attention: Any) -> None:
        self.adapter, self.pair, self.norm = adapter, pair, attention.norm_q
        self.queries: Tensor | None = None
        attention.to_q.register_forward_hook(self._made)
        if getattr(attention, "to_out", None) is None:  # the block has an output layer of its own behind it
            attention.register_forward_hook(self._behind)
        else:
            attention.to_out[0].register_forward_pre_hook(self._before)

    def _made(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.queries = None if self.adapter.tokens is None else output

    def _before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = inputs
        return self._added(states), *others

    def _behind(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._added(output)

    def _added(self, states: Tensor) -> Tensor:
        queries, tokens, self.queries = self.queries, self.adapter.tokens, None
        if queries is None or tokens is None:
            return states
        heads = queries.unflatten(-1, (self.pair.num_heads, -1)).transpose(1, 2)
        heads = heads if self.norm is None else self.norm(heads)
        tokens = _of_branches(tokens, len(heads))
        return states + self.adapter.scale * self.pair(heads, tokens).to(states.dtype)


def _of_branches(tokens: Tensor, rows: int) -> Tensor:
    """Tokens ``[B, Q, E]`` of each branch of guidance, ``[rows, Q, E]``."""
    if rows % len(tokens):
        raise ValueError(f"FeatureInjection.features: found {len(tokens)} rows, expected as many as latents, {rows}, or a divisor")
    return tokens if rows == len(tokens) else tokens.repeat(rows // len(tokens), 1, 1)


def _attends_to_itself(module: nn.Module) -> bool:
    """Whether it is an attention of diffusers whose keys are made of what its queries are made of."""
    to_q, to_k = getattr(module, "to_q", None), getattr(module, "to_k", None)
    if not isinstance(to_q, nn.Linear) or not isinstance(to_k, nn.Linear):
        return False
    return not getattr(module, "is_cross_attention", False) and to_q.in_features == to_k.in_features
