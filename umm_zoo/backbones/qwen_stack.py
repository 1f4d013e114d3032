"""Qwen2.5-VL's decoder layers as a block of their own, run on tokens that attend to a cached prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from umm_zoo.backbones.prefix import LanguageStack, Prefix


class QwenStack(LanguageStack):
    """A loop over the library's layers.

    The library's own loop cannot be used here: its cache grows at every call, and its gradient checkpointing throws it away.

    Args:
        layers, norm, rotary: of the library's text model.

    Raises:
        ValueError: its attention takes no mask of one's own (``flash_attention_2``).
    """

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layers, self.norm, self.rotary = layers, norm, rotary
        self.width = int(cast(Tensor, norm.weight).shape[0])
        if (found := self._config._attn_implementation) not in ("sdpa", "eager"):
            raise ValueError(f"attention: found '{found}', expected 'sdpa' or 'eager', which take a mask among the queries")

    @property
    def _config(self) -> Any:
        return cast(Any, self.layers[0]).self_attn.config

    def copied(self) -> QwenStack:
        """A copy that shares nothing and is trained."""
        twin = copy.deepcopy(self).requires_grad_(True)
        for layer in twin.layers:
            cast(Any, layer).gradient_checkpointing = False  # the library's would drop the prompt's keys
        return twin

    def forward(
        self, tokens: Tensor, prefix: Prefix, position_ids: Tensor, mask: Tensor | None, gradient_checkpointing: bool = False
    ) -> Tensor:
        """See ``LanguageStack``."""
        tokens = tokens.to(cast(Tensor, self.norm.weight).dtype)
        allowed = self._allowed(tokens, prefix, mask)
        places = self.rotary(tokens, position_ids)
        hidden = tokens
        for layer, keys in zip(self.layers, prefix.cache.layers, strict=True):
            settings = {**allowed, "position_embeddings": places, "past_key_values": _ConstantKeys(keys)}
            if gradient_checkpointing and torch.is_grad_enabled():
                hidden = cast(Tensor, checkpoint(layer, hidden, use_reentrant=False, **settings))
            else:
                hidden = layer(hidden, **settings)
        return cast(Tensor, self.norm(hidden))

    @torch.no_grad()
    def attention(self, tokens: Tensor, prefix: Prefix, position_ids: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """See ``LanguageStack``; one layer at a time, so that only one layer's weights are ever held."""
        tokens = tokens.to(cast(Tensor, self.norm.weight).dtype)
        with self._eager():
            allowed = self._allowed(tokens, prefix, mask)
        places = self.rotary(tokens, position_ids)
        hidden, seen = tokens, []
        for layer, keys in zip(self.layers, prefix.cache.layers, strict=True):
            hook = cast(Any, layer).self_attn.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
            try:
                with self._eager():
                    hidden = layer(hidden, **allowed, position_embeddings=places, past_key_values=_ConstantKeys(keys))
            finally:
                hook.remove()
            yield seen.pop()

    def example_prefix(self, batch_size: int, length: int) -> Prefix:
        """Random keys and values for every layer; the first place of the first row is padding."""
        config, weight = self._config, cast(Tensor, self.norm.weight)
        shape = (batch_size, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        cache = DynamicCache(config=config)
        for index in range(len(self.layers)):
            keys, values = (torch.randn(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
            cache.update(keys, values, index)
        mask = torch.ones(batch_size, length, dtype=torch.bool, device=weight.device)
        mask[0, 0] = False
        places = torch.full((batch_size,), length, device=weight.device)
        return Prefix(cache, mask, places, torch.randn(batch_size, config.hidden_size, dtype=weight.dtype, device=weight.device))

    def _allowed(self, tokens: Tensor, prefix: Prefix, mask: Tensor | None) -> dict[str, Any]:
        """The mask ``[B, 1, N, L + N]`` as the attention in use takes it: booleans, or numbers to be added; None where it is of
        no use."""
        if mask is None and not prefix.padded:
            return {"attention_mask": None, "is_causal": False}
        size, count = tokens.shape[:2]
        whole = prefix.mask_with(prefix.attention_mask.new_ones(size, count, count) if mask is None else mask)
        if self._config._attn_implementation == "sdpa":
            return {"attention_mask": whole}
        added = torch.zeros(whole.shape, dtype=tokens.dtype, device=whole.device)
        return {"attention_mask": added.masked_fill(~whole, torch.finfo(tokens.dtype).min)}

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """The one implementation that gives its weights away."""
        config = self._config
        before = config._attn_implementation
        config._attn_implementation = "eager"
        try:
            yield
        finally:
            config._attn_implementation = before


class _ConstantKeys:
    """One layer's keys and values of a prompt, in the place of the library's cache: used, never appended to."""

    def __init__(self, layer: Any) -> None:
        self.keys, self.values = layer.keys, layer.values

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of prompt and new tokens together."""
        return torch.cat([self.keys.to(keys.dtype), keys], dim=2), torch.cat([self.values.to(values.dtype), values], dim=2)
