"""Attention inside segments of a packed sequence (images, windows of a vision tower): one call per length, or one in all."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from umm_zoo.backbones.devices import send

#: The library's name of this attention. It holds ``flash``, for which towers hand over the whole sequence and cut nothing.
SEGMENTED = "segmented_flash"
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Segments:
    """Segments that lie one behind another, as plain numbers: nothing is read from a device to attend inside them.

    Args:
        lengths: of each.
        order: where in the sequence each place of the segments lies, ``[S]``; None where it is the sequence's own order.
        back: the inverse of ``order``.
        bounds: ``[len(lengths) + 1]``, their borders, for kernels that take all at once; None where none is used.
    """

    lengths: tuple[int, ...]
    order: Tensor | None = None
    back: Tensor | None = None
    bounds: Tensor | None = None
    runs: tuple[tuple[int, int], ...] = field(init=False)  #: neighbours of one length: how many, and the length

    def __post_init__(self) -> None:
        runs = tuple((len(list(own)), length) for length, own in groupby(self.lengths))
        object.__setattr__(self, "runs", runs)


def segments(lengths: Sequence[int], places: Tensor | None, device: torch.device, flash: bool, regroup: bool = True) -> Segments:
    """Segments of these lengths on a device.

    Args:
        lengths: in the order of ``places``, or of the sequence.
        places: where in the sequence lies what the segments hold, ``[S]``; None is its own order.
        device: of the sequence.
        flash: whether all are attended to at once, see ``has_flash``; otherwise those of one length become neighbours.
        regroup: False leaves those of one length where they are: no copy of the sequence, and more calls.
    """
    there = torch.arange(sum(lengths))
    own = there if places is None else places
    if regroup and not flash:
        chosen = of_one_length(lengths)
        parts = own.split(list(lengths))
        own, lengths = torch.cat([parts[number] for number in chosen]), [lengths[number] for number in chosen]
    bounds = send(torch.tensor([0, *lengths]).cumsum(0).int(), device) if flash else None
    if torch.equal(own, there):
        return Segments(tuple(lengths), bounds=bounds)
    return Segments(tuple(lengths), send(own, device), send(own.argsort(), device), bounds)


def of_one_length(lengths: Sequence[int]) -> list[int]:
    """Numbers of segments in an order in which those of one length are neighbours; unchanged where they are."""
    found = list(dict.fromkeys(lengths))
    return sorted(range(len(lengths)), key=lambda number: found.index(lengths[number]))


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether one call of a flash kernel takes segments of any lengths: on a GPU in half precision (not tried on one yet)."""
    if device.type != "cuda" or head_dim % 8 or head_dim > 256:
        return False
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    newer = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype in _HALF and (newer or is_flash_attn_2_available())


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Segments | Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The library's attention function of a tower; ``[1, heads, S, head dim]`` to ``[1, S, heads, head dim]``.

    ``cu_seq_lens_q`` are the segments; the library's own tensor of borders, which has to be read first, is one too.
    """
    if not isinstance(cu_seq_lens_q, Segments):
        borders = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        lengths = [end - start for start, end in pairwise(borders)]
        cu_seq_lens_q = segments(lengths, None, query.device, flash=False)
    own = cu_seq_lens_q
    return inside(own, query, key, value, scaling, dropout), None


def inside(
    own: Segments, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, causal: bool = False
) -> Tensor:
    """Attention inside segments, ``[1, heads, S, head dim]`` to ``[1, S, heads, head dim]``; heads may share keys."""
    rows = [part[0].transpose(0, 1) for part in (query, key, value)]  # [S, heads, head dim]
    if own.order is not None:
        rows = [part.index_select(0, own.order) for part in rows]
    if own.bounds is not None and query.dtype in _HALF and not dropout:
        mixed = _at_once(rows, own.bounds, max(own.lengths), scaling, causal)
    else:
        mixed = _in_runs(rows, own, scaling, dropout, causal)
    return (mixed if own.back is None else mixed.index_select(0, own.back))[None]


def _in_runs(rows: list[Tensor], own: Segments, scaling: float | None, dropout: float, causal: bool) -> Tensor:
    """One call per run of segments of one length: without a mask, for padding to the longest is up to twice as slow on a CPU."""
    settings: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "is_causal": causal}
    settings["enable_gqa"] = rows[0].shape[1] > rows[1].shape[1]
    made = []
    for run, *parts in zip(own.runs, *(part.split([count * length for count, length in own.runs]) for part in rows), strict=True):
        query, key, value = (part.unflatten(0, run).transpose(1, 2) for part in parts)  # [count, heads, length, head dim]
        mixed = F.scaled_dot_product_attention(query, key, value, **settings)
        made.append(mixed.transpose(1, 2).flatten(0, 1))
    return made[0] if len(made) == 1 else torch.cat(made)


def _at_once(rows: list[Tensor], bounds: Tensor, longest: int, scaling: float | None, causal: bool) -> Tensor:
    """One call of a kernel for segments of any lengths: flash-attn's where it is installed, else torch's own."""
    query, key, value = (part.contiguous() for part in rows)
    borders = bounds, bounds, longest, longest
    if is_flash_attn_2_available():
        kernel = importlib.import_module("flash_attn").flash_attn_varlen_func
        return cast(Tensor, kernel(query, key, value, *borders, softmax_scale=scaling, causal=causal))
    kernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn  # seconds to import
    settings = {"window_size": (-1, 0 if causal else -1), "enable_gqa": query.shape[1] > key.shape[1]}
    return cast(Tensor, kernel(query, key, value, *borders, scale=scaling, **settings))


AttentionInterface.register(SEGMENTED, attend)
