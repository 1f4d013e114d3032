"""Losses and generation of discrete image tokens: one after the other, or hidden ones from those that are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.generation import join_rows
from umm_zoo.backbones.image_sampling import draw
from umm_zoo.backbones.masked_janus import MaskedJanus
from umm_zoo.backbones.unified import ImageSamples, UnifiedAR, guided
from umm_zoo.blocks.masking import ConfidenceOrder, CosineRatio, CosineUnmasking, MaskRatio, Order, Unmasking, kept_places
from umm_zoo.errors import UserError
from umm_zoo.objectives.rounds import row_generators, uniform_rows


class TokenObjective(ABC):
    """How a model of image tokens learns them and generates them.

    Letters: B prompts, R rows of N tokens, K codes.

    Attributes:
        makes: names of further scalars that ``losses_by`` gives.
    """

    makes: Collection[str] = ()

    @abstractmethod
    def check(self, unified: UnifiedAR) -> None:
        """Refuse a model that is not learnt in this way.

        Raises:
            UserError: it is not.
        """

    @abstractmethod
    def __call__(
        self, unified: UnifiedAR, inputs: VLMInputs, ids: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of each row ``[R]`` in nats, and the share of its tokens that the loss is about ``[R]``.

        Args:
            unified: the model.
            inputs: B prompts.
            ids: ``[R, N]``.
            generator: for what is hidden, on the CPU.
        """

    @abstractmethod
    def sample(self, unified: UnifiedAR, inputs: VLMInputs, seeds: Sequence[int], scale: float, temperature: float) -> ImageSamples:
        """As ``UnifiedAR.sample_image``."""

    def losses_by(self, losses: Tensor, shares: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Means of parts of the rows, and how many rows each is of."""
        return {}, {}


class AutoregressiveTokens(TokenObjective):
    """Each token given those before it in raster order (Janus): the mean cross-entropy of all."""

    def check(self, unified: UnifiedAR) -> None:
        """As the base class."""
        if isinstance(unified, MaskedJanus):
            raise UserError("method.tokens", "none beside a MaskedJanus, which generates in rounds", "a MaskedTokens")

    def __call__(
        self, unified: UnifiedAR, inputs: VLMInputs, ids: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """As the base class."""
        logits = unified.image_logits(inputs, ids).float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape).mean(dim=1)
        return losses, torch.ones_like(losses)

    def sample(self, unified: UnifiedAR, inputs: VLMInputs, seeds: Sequence[int], scale: float, temperature: float) -> ImageSamples:
        """As the base class."""
        return unified.sample_image(inputs, seeds, scale, temperature)


class MaskedTokens(TokenObjective):
    """Hidden tokens given all others, and generated in rounds, the surest first: discrete masked diffusion.

    Show-o (Xie et al., arXiv 2408.12528) and MMaDA (arXiv 2505.15809) learn images so. Tokens of a round are drawn independently.
    The loss of a row is a mean over its own hidden tokens, so that each image counts alike; the released code takes it over those
    of all rows. A healthy loss is high, and moves with the ratio: look at it by the share of hidden tokens, as validation logs it.

    Args:
        ratio: of hidden tokens; None is ``CosineRatio()``.
        weighting: ``masked_mean`` is the mean over hidden tokens; ``inverse_ratio`` their sum over the hidden share of all, whose
            expectation over masks is the mean over all tokens.
        unmasking: rounds of generation; None is 18 by a cosine (Show-o: 12 to 18).
        order: of generation; None is ``ConfidenceOrder()``.
    """

    #: Upper ends of the shares of hidden tokens that validation tells losses apart by.
    ENDS = (0.25, 0.5, 0.75, 1.0)
    makes = tuple(f"image_loss_hidden_{round(100 * end)}" for end in ENDS)

    def __init__(
        self,
        ratio: MaskRatio | None = None,
        weighting: Literal["masked_mean", "inverse_ratio"] = "masked_mean",
        unmasking: Unmasking | None = None,
        order: Order | None = None,
    ) -> None:
        self.ratio, self.weighting = ratio or CosineRatio(), weighting
        self.unmasking, self.order = unmasking or CosineUnmasking(18), order or ConfidenceOrder()

    def check(self, unified: UnifiedAR) -> None:
        """As the base class; and more rounds than tokens."""
        if not isinstance(unified, MaskedJanus):
            raise UserError("method.unified", f"a {type(unified).__name__} beside MaskedTokens", "a MaskedJanus")
        self.unmasking.counts(unified.generated_grid.num_cells)

    def __call__(
        self, unified: UnifiedAR, inputs: VLMInputs, ids: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """As the base class."""
        assert isinstance(unified, MaskedJanus)
        hidden = send(self.ratio.masks(len(ids), ids.shape[1], generator), ids.device)
        logits = unified.masked_logits(inputs, ids, hidden)
        return self.losses(logits, ids, hidden), hidden.float().mean(dim=1)

    def losses(self, logits: Tensor, ids: Tensor, hidden: Tensor, ratios: Tensor | None = None) -> Tensor:
        """The loss of each row, ``[R]``.

        Args:
            logits: ``[R, N, K]``.
            ids: ``[R, N]``.
            hidden: ``[R, N]`` bool.
            ratios: ``[R]``, the chance that a token of the row was hidden with, for ``inverse_ratio``; None is the share of those
                that were.
        """
        errors = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        total = (errors * hidden).sum(dim=1)
        if self.weighting == "masked_mean":
            return total / hidden.sum(dim=1)
        return total / ((hidden.float().mean(dim=1) if ratios is None else ratios) * ids.shape[1])

    @torch.no_grad()
    def sample(self, unified: UnifiedAR, inputs: VLMInputs, seeds: Sequence[int], scale: float, temperature: float) -> ImageSamples:
        """As the base class; log-probabilities are those of the round in which a token was kept."""
        assert isinstance(unified, MaskedJanus)
        group, length = len(seeds) // len(inputs.token_ids), unified.generated_grid.num_cells
        rows = inputs if scale == 1 else join_rows(inputs, unified.unconditional(inputs))
        prefix, generators = unified.prefix(rows).repeat(group), row_generators(seeds)
        ids = torch.zeros(len(seeds), length, dtype=torch.long, device=unified.device)
        kept, hidden = torch.zeros_like(ids, dtype=torch.float), torch.ones_like(ids, dtype=torch.bool)
        counts = self.unmasking.counts(length)
        for step, (now, strength) in enumerate(zip(counts, self.unmasking.scales(scale, counts), strict=True), 1):
            times = len(prefix.last_hidden) // len(seeds)
            logits = unified.logits_behind(prefix, ids.repeat(times, 1), hidden.repeat(times, 1)).float()
            if times == 2:
                conditional, unconditional = logits.chunk(2)
                logits = guided(conditional, unconditional, strength)
            uniform, noise = (send(uniform_rows(generators, length), ids.device) for _ in range(2))
            drawn, likely = (own.view(ids.shape) for own in draw(logits.flatten(0, 1), uniform.flatten(), temperature))
            scores = self.order.scores(step, len(counts), noise, likely.log())
            chosen = kept_places(scores, hidden, now)
            ids, kept, hidden = torch.where(chosen, drawn, ids), torch.where(chosen, likely.log(), kept), hidden & ~chosen
        return ImageSamples(ids, kept)

    def losses_by(self, losses: Tensor, shares: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """By quarters of the share of hidden tokens."""
        ends = torch.tensor(self.ENDS, device=shares.device)
        bins = torch.bucketize(shares, ends, right=False)
        inside = [bins == number for number in range(len(ends))]
        means = [losses[own].mean() if bool(own.any()) else losses.new_zeros(()) for own in inside]
        return dict(zip(self.makes, means, strict=True)), dict(zip(self.makes, (float(own.sum()) for own in inside), strict=True))
