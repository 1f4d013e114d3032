"""Vector quantization whose codes are moving averages of the latents they stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.blocks.quantizers.base import Quantized, straight_through
from umm_zoo.blocks.quantizers.vector import BookQuantizer
from umm_zoo.errors import Count, Positive, Share, Weight
from umm_zoo.objectives.step import num_ranks, rank, sum_over_ranks


class EMAQuantizer(BookQuantizer):
    """Vector quantization with codes that follow the means of their latents (van den Oord et al., 2017, appendix A.1).

    ``after_step`` moves the averages once per optimiser step, by the latents of all its micro-batches and ranks: all codes of a
    step, and of all depths of a residual quantizer, come from one table. The codes have no gradient. ``losses``: ``commitment``.

    Args:
        dim: d.
        size: K.
        decay: of the averages.
        commitment: weight of the mean squared distance of latents to their codes.
        restart_below: a code whose average count per step falls below this becomes a latent of the step; 0 never does that.
        smoothing: added to every count, so that no code is divided by nothing (Laplace).

    Raises:
        ValueError: a table that is too large.
    """

    exact = ("counts", "sums", "step_counts", "step_sums")
    codebook: Tensor
    counts: Tensor
    sums: Tensor
    step_counts: Tensor
    step_sums: Tensor

    def __init__(
        self,
        dim: Count,
        size: Count,
        decay: Share = 0.99,
        commitment: Weight = 0.25,
        restart_below: Weight = 0.0,
        smoothing: Positive = 1e-5,
    ) -> None:
        super().__init__(dim, size, normalised=False)
        self.decay, self.commitment, self.restart_below, self.smoothing = decay, commitment, restart_below, smoothing
        codebook = torch.randn(size, dim) * dim**-0.5
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("step_counts", torch.zeros(size), persistent=False)
        self.register_buffer("step_sums", torch.zeros(size, dim), persistent=False)
        self._latents: Tensor | None = None  # of the last micro-batch, for codes that start again

    def table(self) -> Tensor:
        """See the base class."""
        return self.codebook

    def forward(self, latents: Tensor) -> Quantized:
        """See the base class."""
        _, codes, values = self.look_up(latents)
        found = Quantized(straight_through(latents, values), codes)
        if self.training:
            commitment = F.mse_loss(latents.float(), values.float())
            found.losses = {"commitment": commitment, "loss": self.commitment * commitment}
            if not self.idle:
                self._count(latents.detach(), codes)
        return found

    @torch.no_grad()
    def _count(self, latents: Tensor, codes: Tensor) -> None:
        flat, places = latents.flatten(0, -2).to(self.sums.dtype), codes.flatten()
        self.step_counts.index_add_(0, places, torch.ones_like(flat[:, 0]))
        self.step_sums.index_add_(0, places, flat)
        self._latents = flat

    @torch.no_grad()
    def after_step(self) -> None:
        """See the base class; a step without latents changes nothing."""
        counts, sums = sum_over_ranks(self.step_counts), sum_over_ranks(self.step_sums)
        pace = (1 - self.decay) * (counts.sum() > 0)
        self.counts.lerp_(counts, pace)
        self.sums.lerp_(sums, pace)
        whole = self.counts.sum()
        smooth = whole * (self.counts + self.smoothing) / (whole + len(self.counts) * self.smoothing)
        self.codebook.copy_(torch.where(pace > 0, self.sums / smooth[:, None], self.codebook))
        if self.restart_below:
            self._restart(pace > 0)
        self.forget_step()

    def forget_step(self) -> None:
        """See the base class."""
        self.step_counts.zero_()
        self.step_sums.zero_()
        self._latents = None

    def _restart(self, moved: Tensor) -> None:
        """Codes that are hardly used become latents of the first rank that has any, the same ones on all ranks."""
        own = self.codebook.new_zeros(1, self.dim) if self._latents is None else self._latents
        drawn = own[torch.randint(len(own), (self.num_codes,), device=own.device)]
        holders = sum_over_ranks(torch.eye(num_ranks(), device=own.device)[rank()] * (self._latents is not None))
        drawn = sum_over_ranks(drawn * (holders.argmax() == rank()))
        dead = (self.counts < self.restart_below) & moved
        for kept, fresh in ((self.codebook, drawn), (self.sums, drawn), (self.counts, torch.ones_like(self.counts))):
            kept.copy_(torch.where(dead if kept.ndim == 1 else dead[:, None], fresh, kept))
