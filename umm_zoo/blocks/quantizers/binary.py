"""Binary quantization: each number of a latent becomes a bit, on the sphere (BSQ) or not (lookup-free, LFQ)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.blocks.quantizers.base import MOST_BITS, Quantized, Quantizer, entropy, straight_through
from umm_zoo.errors import Count, Positive, Weight

#: Bits of a group of which all combinations are counted.
_MOST_GROUPED = 12


class BinaryQuantizer(Quantizer):
    """Binary spherical quantization (BSQ), and without the sphere lookup-free quantization (LFQ).

    ``u = z / |z|`` and ``sign(u) / sqrt(d)``; LFQ takes ``sign(z)``. A zero counts as negative. ``losses``: ``token_entropy``,
    how undecided the bits of a token are, ``E[H(p)]`` in nats; ``code_entropy``, how evenly codes are used, ``H(E[p])``, summed
    over groups of bits (an upper bound, which sees what bits have to do with each other inside a group alone); ``commitment``,
    ``|value - u|^2`` over tokens (BSQ-ViT's code, which gives it no weight, compares u with signs that are not divided by
    sqrt(d)). ``loss`` is ``entropy * (token_entropy - diversity * code_entropy) / inverse_temperature + commitment *
    commitment``, with p(bit = 1) the sigmoid of ``4 inverse_temperature u_i / sqrt(d)``.

    A token's bits are cut into codes of ``code_bits`` at most, all of about one size, the first channel the highest bit, as in
    the releases; theirs, sums of float32, are wrong from 25 bits on.

    Reference: Zhao et al., 2024, arXiv 2406.07548 (BSQ, equations 4 to 10); Yu et al., 2023, arXiv 2310.05737 (LFQ).

    Args:
        bits: d.
        spherical: BSQ; false is LFQ.
        code_bits: of one code, at most 16 (our choice: 28 bits become two codes of 14).
        entropy_bits: size of the groups; 1 is the releases' "analytical" mode.
        entropy: weight of both entropies.
        diversity: weight of the second against the first.
        inverse_temperature: 1 in BSQ's experiments, 100 in QLIP's module.
        commitment: weight.
        ste_scale: ``paper`` lets the gradient of the values reach u as it is; ``release`` divides it by sqrt(d), as the two
            releases do, which quantize to 1 and scale afterwards.

    Raises:
        ValueError: codes or groups of too many bits.
    """

    scale: Tensor

    def __init__(
        self,
        bits: Count,
        spherical: bool = True,
        code_bits: Count = 14,
        entropy_bits: Count = 1,
        entropy: Weight = 0.1,
        diversity: Weight = 1.0,
        inverse_temperature: Positive = 1.0,
        commitment: Weight = 0.0,
        ste_scale: Literal["paper", "release"] = "paper",
    ) -> None:
        super().__init__()
        for name, value, most in (("code_bits", code_bits, MOST_BITS), ("entropy_bits", entropy_bits, _MOST_GROUPED)):
            if value > most:
                raise ValueError(f"BinaryQuantizer.{name}: found {value}, expected at most {most}")
        self.dim, self.bits, self.spherical, self.keeps_length = bits, float(bits), spherical, not spherical
        self.codes_per_token = -(-bits // code_bits)
        self.sizes = [bits // self.codes_per_token + (place < bits % self.codes_per_token) for place in range(self.codes_per_token)]
        self.num_codes = 2 ** self.sizes[0]
        self.entropy_bits, self.entropy, self.diversity, self.commitment = entropy_bits, entropy, diversity, commitment
        self.inverse_temperature, self.ste_scale = inverse_temperature, ste_scale
        self.register_buffer("scale", torch.tensor(bits**-0.5 if spherical else 1.0), persistent=False)

    def forward(self, latents: Tensor) -> Quantized:
        """See the base class."""
        placed = F.normalize(latents, dim=-1) if self.spherical else latents
        positive = latents > 0
        values = self._values(positive)
        carrier = placed * self.scale if self.ste_scale == "release" else placed
        found = Quantized(straight_through(carrier, values), self._codes(positive))
        if self.training:
            found.losses = self._losses(placed, values)
        return found

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """See the base class: groups may be unequal by a bit."""
        return tuple(2**size for size in self.sizes)

    def values_of(self, codes: Tensor) -> Tensor:
        """See the base class."""
        parts = [codes[..., place, None] >> self._shifts(size, codes) & 1 for place, size in enumerate(self.sizes)]
        return self._values(torch.cat(parts, dim=-1) == 1)

    def _codes(self, positive: Tensor) -> Tensor:
        parts = positive.long().split(self.sizes, dim=-1)
        return torch.stack([(part << self._shifts(part.shape[-1], part)).sum(dim=-1) for part in parts], dim=-1)

    @staticmethod
    def _shifts(size: int, like: Tensor) -> Tensor:
        return torch.arange(size - 1, -1, -1, device=like.device)

    def _values(self, positive: Tensor) -> Tensor:
        return torch.where(positive, self.scale, -self.scale)

    def _losses(self, placed: Tensor, values: Tensor) -> dict[str, Tensor]:
        placed = placed.float()
        token, code = entropies(4 * self.inverse_temperature * self.scale.float() * placed, self.entropy_bits)
        commitment = (values.float() - placed).square().sum(dim=-1).mean()
        loss = self.entropy * (token - self.diversity * code) / self.inverse_temperature + self.commitment * commitment
        return {"token_entropy": token, "code_entropy": code, "commitment": commitment, "loss": loss}


def entropies(logits: Tensor, group: int = 1) -> tuple[Tensor, Tensor]:
    """Mean entropy of the tokens' independent bits, and that of the mean distribution summed over groups of bits; nats, ``[]``.

    Shape:
        - logits: ``[B, N, d]``, of each bit being one
    """
    token = (F.softplus(logits) - logits * logits.sigmoid()).sum(dim=-1).mean()
    code = logits.new_zeros(())
    for bits in logits.sigmoid().flatten(0, -2).split(group, dim=-1):  # [M, g]
        joint = bits.new_ones(len(bits), 1)
        for bit in bits.unbind(dim=1):
            joint = torch.cat([joint * (1 - bit)[:, None], joint * bit[:, None]], dim=1)
        code = code + entropy(joint.mean(dim=0))
    return token, code
