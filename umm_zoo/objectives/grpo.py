"""Group-relative policy optimisation of the tokens that a language model has drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from umm_zoo.objectives.advantages import Advantage, GroupStandardised

# -- how the terms of all tokens become one number -----------------------------------------------------------------------------


class Aggregation(ABC):
    """The weight that each drawn token has in the loss.

    Weights rather than a reduction, so that a large rollout can be scored in parts, each with the weights it has in the whole.

    Shape:
        mask ``[R, T]`` bool -> ``[R, T]``, 0 outside the mask.
    """

    @abstractmethod
    def __call__(self, mask: Tensor) -> Tensor:
        """Weights of one rollout."""


class SequenceMean(Aggregation):
    """``grpo``: the mean over the tokens of each answer, then over answers (DeepSeekMath, and UAE by citing it).

    The tokens of a long answer weigh less, so a long bad one is punished less: answers grow by themselves. For the claim that a
    reward makes them grow use ``ConstantLength``.
    """

    def __call__(self, mask: Tensor) -> Tensor:
        """1 / (R |y|)."""
        weights = mask.float()
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1) / len(mask)


class TokenMean(Aggregation):
    """``dapo``: the mean over all tokens of the batch, of all ranks together (Yu et al., 2025, arXiv 2503.14476)."""

    def __call__(self, mask: Tensor) -> Tensor:
        """1 / (all tokens)."""
        total = mask.sum().float()
        if dist.is_available() and dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
            dist.all_reduce(total)
            total = total / ranks  # gradients are averaged over ranks afterwards
        return mask.float() / total.clamp(min=1)


class ConstantLength(Aggregation):
    """``dr_grpo``: the sum over tokens divided by a constant, the same for short and long answers (arXiv 2503.20783).

    Args:
        length: the largest number of tokens that an answer may have.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, mask: Tensor) -> Tensor:
        """1 / (R length)."""
        return mask.float() / (len(mask) * self.length)


# -- what is compared with the policy that drew the tokens ---------------------------------------------------------------------


class Ratio(ABC):
    """The importance ratio of each token from the log-ratios of all.

    Shape:
        log-ratios ``[R, T]`` (0 outside the mask) and mask ``[R, T]`` -> ``[R, T]``
    """

    @abstractmethod
    def __call__(self, log_ratios: Tensor, mask: Tensor) -> Tensor:
        """Ratios."""


class TokenRatio(Ratio):
    """Each token's own, ``exp(log pi - log pi_old)``: GRPO's."""

    def __call__(self, log_ratios: Tensor, mask: Tensor) -> Tensor:
        """Exponential."""
        return log_ratios.exp()


class SequenceRatio(Ratio):
    """One for the whole answer, exp of the mean log-ratio of its tokens: GSPO's (Zheng et al., 2025, arXiv 2507.18071)."""

    def __call__(self, log_ratios: Tensor, mask: Tensor) -> Tensor:
        """The same for every token of a row."""
        weights = mask.to(log_ratios.dtype)
        mean = (log_ratios * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return mean.exp().expand_as(log_ratios)


# -- the loss --------------------------------------------------------------------------------------------------------------------


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimate of KL(pi || reference) from one draw: ``rho - log rho - 1``, ``rho = reference / pi``; never negative."""
    gap = reference - log_probs
    return gap.exp() - gap - 1


class GRPO:
    """Clipped policy gradient with advantages relative to the group of answers to the same prompt; no value network.

    ``- sum_t w_t [ min(r_t A, clip(r_t, 1 - low, 1 + high) A) - beta k3_t ]``, the weights w being the aggregation's. With one
    update per rollout every ratio is exactly 1 and only its gradient counts. Eq. 3 of the DeepSeekMath paper, which UAE adopts by
    citing it.

    Reference: Shao et al., "DeepSeekMath" (arXiv 2402.03300); Yan et al., "UAE" (arXiv 2509.09666).

    Args:
        advantage: of a sample in its group; None is ``GroupStandardised``.
        aggregation: weights of the tokens; None is ``SequenceMean``, the paper's literal objective.
        ratio: None is ``TokenRatio``.
        clip_low: UAE leaves it open; 0.2 is what DeepSeekMath's parents use.
        clip_high: None is ``clip_low`` (DAPO takes 0.28).
        kl_weight: beta; 1e-6 in UAE, which is almost none.

    Shape:
        - log_probs, old, reference, mask, weights: ``[R, T]``, R = B * G answers, the G of one prompt next to each other
        - advantages: ``[R]``
    """

    def __init__(
        self,
        advantage: Advantage | None = None,
        aggregation: Aggregation | None = None,
        ratio: Ratio | None = None,
        clip_low: float = 0.2,
        clip_high: float | None = None,
        kl_weight: float = 1e-6,
    ) -> None:
        self.advantage = advantage or GroupStandardised()
        self.aggregation = aggregation or SequenceMean()
        self.ratio = ratio or TokenRatio()
        self.clip_low, self.clip_high = clip_low, clip_low if clip_high is None else clip_high
        self.kl_weight = kl_weight

    def __call__(
        self,
        log_probs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        old: Tensor | None = None,
        reference: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of some rows of a rollout, and what to watch.

        Args:
            log_probs: of the drawn tokens under the policy, with a gradient.
            mask: True on the tokens of an answer, its end token included.
            advantages: of the rows.
            old: log-probabilities under the policy that drew them; None where that is this very policy.
            reference: those under the reference policy; None leaves the KL out.
            weights: of the tokens in the whole rollout; None aggregates over these rows alone.

        Returns:
            ``loss``; and without gradient ``clip_fraction`` and ``kl``, weighted means over the tokens of these rows.
        """
        old = log_probs.detach() if old is None else old
        weights = self.aggregation(mask) if weights is None else weights
        gains = advantages[:, None].to(log_probs.dtype)
        ratios = self.ratio((log_probs - old).masked_fill(~mask, 0.0), mask)  # [R, T]
        clipped = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate = torch.minimum(ratios * gains, clipped * gains)
        divergence = torch.zeros_like(surrogate)
        if reference is not None:
            divergence = k3(log_probs, reference.detach()).masked_fill(~mask, 0.0)
        terms = (surrogate - self.kl_weight * divergence).masked_fill(~mask, 0.0)
        with torch.no_grad():
            share = weights / weights.sum().clamp(min=1e-12)
            active = (clipped * gains < ratios * gains) & mask
        return {
            "loss": -(weights * terms).sum(),
            "clip_fraction": (share * active).sum(),
            "kl": (share * divergence.detach()).sum(),
        }
