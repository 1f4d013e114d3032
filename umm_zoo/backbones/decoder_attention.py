"""Attention of language models as the library calls it: heads share keys, and no mask is read, for which a host would wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from umm_zoo.backbones import flexible
from umm_zoo.backbones.flexible import FLEX, BlockedMask, blocked
from umm_zoo.backbones.segments import inside
from umm_zoo.errors import UserError

#: The library's names of it. Its own ``sdpa`` looks whether a mask hides anything, and whether rows are packed; the second gives
#: masks to flex attention where a kernel for it is used, and is the first elsewhere.
SDPA, SDPA_OR_FLEX = "sdpa_unread", "sdpa_or_flex"
#: Whether rows hold padding; None where nobody knows: then the mask is looked at.
_padded: ContextVar[bool | None] = ContextVar("padded", default=None)
#: The library's attention module whose outputs nobody reads.
_unread: ContextVar[Any] = ContextVar("unread", default=None)


def read_no_masks(decoder: Any) -> None:
    """Let a decoder whose attention is ``sdpa`` take the caller's word for whether rows are padded; see ``said``.

    Raises:
        UserError: flex attention for a decoder of the library that takes no attention function.
    """
    takes, chosen = getattr(decoder, "_supports_attention_backend", False), decoder.config._attn_implementation
    if takes and chosen == "sdpa":
        decoder.config._attn_implementation = SDPA
    if chosen == SDPA_OR_FLEX and not takes:
        raise UserError("attention", f"'{FLEX}' for a {decoder.config.model_type}, which takes no such function", "sdpa")


def reads_no_masks(decoder: Any) -> bool:
    """Whether ``said`` means anything to a decoder."""
    return decoder.config._attn_implementation in (SDPA, SDPA_OR_FLEX)


@contextmanager
def keys_only(layer: Any) -> Iterator[None]:
    """The time in which nobody reads what comes out of a decoder's layer, but its keys and values alone.

    Its attention, where that is ``attend``, and its MLP hand on what they are given.
    """
    mlp, token = getattr(layer, "mlp", None) or nn.Identity(), _unread.set(layer.self_attn)
    own = vars(mlp).get("forward")  # whose weights wait or are quantised may have one
    vars(mlp)["forward"] = lambda states, *_, **__: states
    try:
        yield
    finally:
        _unread.reset(token)
        vars(mlp).pop("forward") if own is None else vars(mlp).update(forward=own)


@contextmanager
def said(padded: bool) -> Iterator[None]:
    """The time in which masks are made of rows of which one knows whether they are padded."""
    token = _padded.set(padded)
    try:
        yield
    finally:
        _padded.reset(token)


def run_decoder(
    decoder: Any, embeddings: Tensor, mask: Tensor | None, position_ids: Tensor, cache: Any = None, **extras: Any
) -> Tensor:
    """Last hidden states of the library's decoder; no mask where nothing is padded."""
    padded = mask is not None
    if mask is None and cache is None and reads_no_masks(decoder):  # without any the library looks for packed rows
        mask = embeddings.new_ones(embeddings.shape[:2], dtype=torch.bool)
    given = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": position_ids}
    with said(padded):
        made = decoder(**given, past_key_values=cache, use_cache=cache is not None, **extras)
    return cast(Tensor, made.last_hidden_state)


def make_mask(*args: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """The library's function that makes masks: whole where rows are padded, and none where they are not and none is needed."""
    padded = _padded.get()
    if padded is not None:
        attention_mask, allow_is_causal_skip = attention_mask if padded else None, allow_is_causal_skip and not padded
    kwargs |= {"attention_mask": attention_mask, "allow_is_causal_skip": allow_is_causal_skip}
    return sdpa_mask(*args, **kwargs)


def make_blocked_mask(*args: Any, **kwargs: Any) -> Tensor | BlockedMask | None:
    """``make_mask``, in blocks where a kernel for it is used."""
    made = make_mask(*args, **kwargs)
    return None if made is None else blocked(made)


def with_shared_keys(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """Attention of heads ``[B, H, N, d]`` of which several share the keys and values of one of ``[B, G, L, d]``.

    A CPU's kernel shares them (0.8 to 1.0 of the time, and no copy); a GPU's does without a mask alone, else they are repeated.
    """
    times = query.shape[1] // key.shape[1]
    shared = times > 1 and (query.device.type == "cpu" or mask is None)
    if times > 1 and not shared:
        key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=shared, **settings)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The library's ``sdpa``; of more than one token on a CPU ``with_shared_keys``, of ``packed`` rows inside each, under a mask in
    blocks flex attention where that takes it."""
    if module is not None and module is _unread.get():
        return query.transpose(1, 2), None
    if (packed := kwargs.pop("packed", None)) is not None:
        packed.met = True
        return inside(packed.segments, query, key, value, scaling, dropout, causal=True), None
    bare = not any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if isinstance(attention_mask, BlockedMask):
        made = None if dropout or not bare else flexible.attend(query, key, value, attention_mask.blocks, scaling)
        if made is not None:
            return made.transpose(1, 2).contiguous(), None
        attention_mask = attention_mask.whole
    several = query.shape[2] > 1 and query.device.type == "cpu" and query.shape[1] > key.shape[1]
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    unequal = causal and query.shape[2] != key.shape[2]
    if not several or unequal or not bare:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    mixed = with_shared_keys(query, key, value, attention_mask, dropout_p=dropout, scale=scaling, is_causal=causal)
    return mixed.transpose(1, 2).contiguous(), None


for _name, _masks in ((SDPA, make_mask), (SDPA_OR_FLEX, make_blocked_mask)):
    AttentionInterface.register(_name, attend)
    AttentionMaskInterface.register(_name, _masks)
