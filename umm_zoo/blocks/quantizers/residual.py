"""Residual quantization: each stage quantizes what the stages before it have left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from umm_zoo.blocks.quantizers.base import Quantized, Quantizer, straight_through
from umm_zoo.errors import Count, several


class ResidualQuantizer(Quantizer):
    """Residual quantization: ``r_1 = z``, ``r_(i+1) = r_i - values(r_i)``; the value of a token is the sum over the stages.

    ``losses`` are the stages' means. The commitment of a stage to its residual, with the stages before held fixed, equals that of
    the latent to the sum so far, in value and in gradient (RQ-VAE, Lee et al., 2022, arXiv 2203.01941, equation 7).

    Args:
        stages: quantizers of one width that keep lengths, first to last.
        repeats: how often the stages are gone through with the same tables: one stage, eight times, is DualToken's.

    Raises:
        ValueError: stages of unlike widths or numbers of codes, or that keep directions alone.
    """

    def __init__(self, stages: Sequence[Quantizer], repeats: Count = 1) -> None:
        super().__init__()
        several("stages", stages, nn.Module)
        for name in ("dim", "num_codes"):
            if len({getattr(stage, name) for stage in stages}) != 1:
                found = [getattr(stage, name) for stage in stages]
                raise ValueError(f"ResidualQuantizer.stages: found {name} {found}, expected one or more stages of one {name}")
        if odd := [type(stage).__name__ for stage in stages if not stage.keeps_length]:
            raise ValueError(f"ResidualQuantizer.stages: found a normalised {odd[0]}, expected stages that keep lengths")
        self.stages: nn.ModuleList = nn.ModuleList(stages)
        self.repeats, self.dim, self.num_codes = repeats, stages[0].dim, stages[0].num_codes
        self.codes_per_token = repeats * sum(stage.codes_per_token for stage in stages)
        self.bits = repeats * sum(stage.bits for stage in stages)

    def forward(self, latents: Tensor) -> Quantized:
        """See the base class."""
        found: list[Quantized] = []
        values = torch.zeros_like(latents)
        for stage in self._in_turn():
            found.append(stage(latents - values))
            values = values + found[-1].embeddings.detach()
        codes = torch.cat([quantized.codes for quantized in found], dim=-1)
        losses = {name: torch.stack([own.losses[name] for own in found]).mean() for name in found[0].losses}
        return Quantized(straight_through(latents, values), codes, losses)

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """See the base class."""
        return sum((stage.code_sizes for stage in self._in_turn()), ())

    def values_of(self, codes: Tensor) -> Tensor:
        """See the base class."""
        stages = self._in_turn()
        parts = codes.split([stage.codes_per_token for stage in stages], dim=-1)
        first, *others = (stage.values_of(part) for stage, part in zip(stages, parts, strict=True))
        for values in others:
            first = first + values
        return first

    def after_step(self) -> None:
        """See the base class; every table once."""
        for stage in self._in_turn()[: len(self.stages)]:
            stage.after_step()

    def forget_step(self) -> None:
        """See the base class."""
        for stage in self._in_turn():
            stage.forget_step()

    def _in_turn(self) -> list[Quantizer]:
        return [stage for _ in range(self.repeats) for stage in self.stages if isinstance(stage, Quantizer)]
