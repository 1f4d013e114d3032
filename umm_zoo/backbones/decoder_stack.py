"""Decoder layers of a library's language model as a block of their own, run on tokens that attend to a cached prompt."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from umm_zoo.backbones.decoder_attention import SDPA, SDPA_OR_FLEX, keys_only
from umm_zoo.backbones.flexible import blocked
from umm_zoo.backbones.prefix import LanguageStack, Prefix
from umm_zoo.backbones.quantized import find_quantized
from umm_zoo.backbones.recomputing import recomputed
from umm_zoo.errors import UserError


class DecoderStack(LanguageStack):
    """A loop over the library's layers.

    The library's own loop cannot be used here: its cache grows at every call, and its gradient checkpointing throws it away.
    Layers with a sliding window attend to what stands less than the window away, counted in tokens as the library does, in both
    directions.

    Args:
        layers, norm, rotary: of the library's text model.
        plain_positions: the model has no M-RoPE: of the three position ids, which are equal, it takes one.

    Raises:
        ValueError: its attention takes no mask of one's own (``flash_attention_2``).
    """

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, rotary: nn.Module, plain_positions: bool = False) -> None:
        super().__init__()
        self.layers, self.norm, self.rotary, self.plain_positions = layers, norm, rotary, plain_positions
        self.width = int(cast(Tensor, norm.weight).shape[0])
        if (found := self._config._attn_implementation) not in ("sdpa", SDPA, SDPA_OR_FLEX, "eager"):
            expected = "'sdpa', 'flex_attention' or 'eager', which take a mask among the queries"
            raise ValueError(f"attention: found '{found}', expected {expected}")

    @property
    def _config(self) -> Any:
        return cast(Any, self.layers[0]).self_attn.config

    @property
    def _kinds(self) -> list[str]:
        """Of the attention of each layer; a window without a list of them, as Mistral's, is that of all layers."""
        everywhere = "full_attention" if getattr(self._config, "sliding_window", None) is None else "sliding_attention"
        return list(getattr(self._config, "layer_types", None) or [everywhere] * len(self.layers))

    def copied(self) -> DecoderStack:
        """A copy that shares nothing and is trained."""
        if (found := find_quantized(self)) is not None:
            expected = "weights that are not, or a pathway through the frozen model (FrozenPathway)"
            raise UserError("", f"quantised weights ('{found}') of which a trained copy is to be made", expected)
        twin = copy.deepcopy(self).requires_grad_(True)
        for layer in twin.layers:
            cast(Any, layer).gradient_checkpointing = False  # the library's would drop the prompt's keys
        return twin

    def forward(
        self, tokens: Tensor, prefix: Prefix, position_ids: Tensor, mask: Tensor | None, gradient_checkpointing: bool = False
    ) -> Tensor:
        """See ``LanguageStack``."""
        tokens = tokens.to(cast(Tensor, self.norm.weight).dtype)
        settings = self._settings(tokens, prefix, position_ids, mask)
        hidden = tokens
        for layer, kind, keys in zip(self.layers, self._kinds, prefix.cache.layers, strict=True):
            own = {**settings[kind], "past_key_values": _ConstantKeys(keys)}
            if gradient_checkpointing and torch.is_grad_enabled():
                hidden = cast(Tensor, recomputed(layer, hidden, **own))
            else:
                hidden = layer(hidden, **own)
        return cast(Tensor, self.norm(hidden))

    @torch.no_grad()
    def attention(self, tokens: Tensor, prefix: Prefix, position_ids: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """See ``LanguageStack``; one layer at a time, so that only one layer's weights are ever held."""
        tokens = tokens.to(cast(Tensor, self.norm.weight).dtype)
        with self._eager():
            settings = self._settings(tokens, prefix, position_ids, mask)
        hidden, seen = tokens, []
        for layer, kind, keys in zip(self.layers, self._kinds, prefix.cache.layers, strict=True):
            hook = cast(Any, layer).self_attn.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
            try:
                with self._eager():
                    hidden = layer(hidden, **settings[kind], past_key_values=_ConstantKeys(keys))
            finally:
                hook.remove()
            yield seen.pop()

    def keys_only(self) -> AbstractContextManager[None]:
        """See ``LanguageStack``: the last layer's."""
        return keys_only(self.layers[-1])

    def example_prefix(self, batch_size: int, length: int) -> Prefix:
        """Random keys and values for every layer; the first place of the first row is padding."""
        config, weight = self._config, cast(Tensor, self.norm.weight)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape, cache = (batch_size, config.num_key_value_heads, length, head), DynamicCache()
        for index in range(len(self.layers)):
            keys, values = (torch.randn(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
            cache.update(keys, values, index)
        mask = torch.ones(batch_size, length, dtype=torch.bool, device=weight.device)
        mask[0, 0] = False
        places = torch.full((batch_size,), length, device=weight.device)
        last = torch.randn(batch_size, config.hidden_size, dtype=weight.dtype, device=weight.device)
        return Prefix(cache, mask, places, last, plain_positions=self.plain_positions)

    def _settings(self, tokens: Tensor, prefix: Prefix, position_ids: Tensor, mask: Tensor | None) -> dict[str, dict[str, Any]]:
        """Rotations and masks by the kind of a layer's attention."""
        ids = position_ids[0] if self.plain_positions else position_ids
        by_kind = "layer_type" in inspect.signature(self.rotary.forward).parameters  # Gemma 3: a base frequency for each kind
        settings = {}
        for kind in set(self._kinds):
            places = self.rotary(tokens, ids, kind) if by_kind else self.rotary(tokens, ids)
            settings[kind] = {**self._allowed(tokens, prefix, mask, kind), "position_embeddings": places}
        return settings

    def _allowed(self, tokens: Tensor, prefix: Prefix, mask: Tensor | None, kind: str) -> dict[str, Any]:
        """The mask ``[B, 1, N, L + N]`` as the attention in use takes it: booleans, blocks of them, or numbers to be added; None
        where it is of no use."""
        size, count = tokens.shape[:2]
        window = self._config.sliding_window if kind == "sliding_attention" else None
        if window is not None and prefix.attention_mask.shape[1] + count <= window:
            window = None
        if mask is None and window is None and not prefix.padded:
            return {"attention_mask": None, "is_causal": False}
        whole = prefix.mask_with(prefix.attention_mask.new_ones(size, count, count) if mask is None else mask)
        if window is not None:
            new = prefix.attention_mask.new_ones(size, count)
            numbers = torch.cat([prefix.attention_mask, new], dim=1).cumsum(dim=1)  # [B, L + N], without padding
            whole = whole & ((numbers[:, -count:, None] - numbers[:, None]).abs() < window)[:, None]
        if (chosen := self._config._attn_implementation) != "eager":
            return {"attention_mask": blocked(whole) if chosen == SDPA_OR_FLEX else whole}
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
