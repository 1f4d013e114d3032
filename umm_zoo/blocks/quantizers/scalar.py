"""Finite scalar quantization: each number of a latent is rounded to one of a few levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from umm_zoo.blocks.quantizers.base import MOST_BITS, Quantized, Quantizer, straight_through
from umm_zoo.errors import Count, several

#: By how much the bound of a channel exceeds its outermost level, so that rounding reaches it (the paper's code).
_MARGIN = 1e-3


class FiniteScalarQuantizer(Quantizer):
    """Finite scalar quantization (Mentzer et al., 2023, arXiv 2309.15505): no table, no loss, nothing to train.

    Channel i is bounded by a tanh, rounded to one of L_i integers, and divided by ``floor(L_i / 2)``: values lie in [-1, 1], and an
    even L reaches -1 but not 1. The gradient goes through the rounding alone and keeps the slope of the tanh. A token has one code,
    the first channel fastest, while there are no more than 2^16 of them, and else one code per channel.

    Args:
        levels: L_i; d is their number. The paper has [8, 6, 5] for 8 bits, [8, 5, 5, 5] for 10, [7, 5, 5, 5, 5] for 12.

    Raises:
        ValueError: fewer than two levels.
    """

    levels: Tensor
    strides: Tensor
    halves: Tensor

    def __init__(self, levels: Sequence[Count]) -> None:
        super().__init__()
        several("levels", levels, int)
        if not levels or min(levels) < 2:
            raise ValueError(f"FiniteScalarQuantizer.levels: found {list(levels)}, expected one or more, each of at least 2")
        self.dim, whole = len(levels), math.prod(levels)
        self.single = whole <= 2**MOST_BITS
        self.num_codes, self.codes_per_token = (whole, 1) if self.single else (max(levels), self.dim)
        self.bits = sum(math.log2(level) for level in levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        strides = [math.prod(levels[:place]) for place in range(len(levels))]
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        self.register_buffer("halves", torch.tensor([float(level // 2) for level in levels]), persistent=False)

    def forward(self, latents: Tensor) -> Quantized:
        """See the base class."""
        bounded = self.bound(latents)
        steps = bounded.detach().round()  # integers from -floor(L / 2)
        digits = steps.long() + self.levels // 2
        codes = (digits * self.strides).sum(dim=-1, keepdim=True) if self.single else digits
        values = self._values(digits)
        return Quantized(straight_through((bounded / self.halves).to(values.dtype), values), codes)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """See the base class: each number has its own levels."""
        return (self.num_codes,) if self.single else tuple(self.levels.tolist())

    def bound(self, latents: Tensor) -> Tensor:
        """Latents squashed to just beyond their outermost levels, in float32 at least: bfloat16 would round to other levels."""
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        half = ((self.levels - 1) * (1 + _MARGIN) / 2).to(wide.dtype)
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(wide.dtype)
        return (wide + (offset / half).atanh()).tanh() * half - offset

    def values_of(self, codes: Tensor) -> Tensor:
        """See the base class."""
        return self._values(codes // self.strides % self.levels if self.single else codes)

    def _values(self, digits: Tensor) -> Tensor:
        return (digits - self.levels // 2).to(self.halves.dtype) / self.halves
