"""Flex attention under masks of one's own: a GPU leaves out the blocks in which nobody attends to anybody.

It has not run on a GPU yet; on a CPU its kernel without gradients, and its plain form with them, agree with ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton

#: Our word in experiment files, and transformers': the language model's attention, while a vision tower keeps ``sdpa``.
FLEX = "flex_attention"
#: Rows and columns of a block, the library's; a kernel takes no narrower heads, and other dtypes not at all.
_BLOCK, _NARROWEST = 128, 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BlockedMask:
    """A mask as a whole, and as blocks.

    Args:
        whole: ``[B, 1, N, L]`` bool, True where the row may attend to the column.
        blocks: which blocks of it hold anything, and which are True throughout.
    """

    whole: Tensor
    blocks: BlockMask


def runs_on(device: torch.device) -> bool:
    """Whether a kernel is used there: on a GPU that Triton compiles for."""
    return device.type == "cuda" and has_triton()


def blocked(whole: Tensor) -> Tensor | BlockedMask:
    """A mask ``[B, 1, N, L]`` in blocks where a kernel is used; nothing is read off the device.

    One new token at a time is left as it is: there is nothing to be left out.
    """
    if not runs_on(whole.device) or whole.shape[2] == 1:
        return whole
    more = [-side % _BLOCK for side in whole.shape[-2:]]
    blocks = F.pad(whole, (0, more[1], 0, more[0])).unflatten(-1, (-1, _BLOCK)).unflatten(-3, (-1, _BLOCK))
    held = blocks.sum((-3, -1))  # [B, 1, N / 128, L / 128]
    full = held == _BLOCK**2

    def allows(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return whole[row, 0, query, key]

    lengths = whole.shape[-2], whole.shape[-1]
    made = BlockMask.from_kv_blocks(
        *_listed((held > 0) & ~full), *_listed(full), BLOCK_SIZE=_BLOCK, mask_mod=allows, seq_lengths=lengths
    )
    return BlockedMask(whole, made)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row of them hold, and the numbers of these first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scale: float | None) -> Tensor | None:
    """Attention of heads ``[B, H, N, d]`` to those of ``[B, G, L, d]``, which they share; None where the kernel takes no such."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (part.to(dtype) for part in (query, key, value))
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype or query.shape[-1] < _NARROWEST:
        return None
    run = cast(Callable[..., Tensor], flex_attention)
    if query.device.type != "cpu" and not torch.compiler.is_compiling():  # what is compiled around it compiles it too
        run = _compiled()
    return run(query, key, value, block_mask=blocks, scale=scale, enable_gqa=query.shape[1] > key.shape[1])


@cache
def _compiled() -> Callable[..., Tensor]:
    """The kernel, compiled for the shapes that it meets."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention))
