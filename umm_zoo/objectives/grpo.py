"""Group-relative policy optimisation of tokens that a language model has sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from umm_zoo.errors import Count, Weight
from umm_zoo.objectives.advantages import Advantage, GroupStandardised


class Aggregation(ABC):
    """Weights of the sampled tokens in the loss.

    Weights rather than a reduction, so that a large rollout can be scored in parts, each with the weights it has in the whole.

    Shape:
        mask ``[R, T]`` bool -> ``[R, T]``, 0 outside the mask.
    """

    def count(self, mask: Tensor) -> int | Tensor:
        """Number of what the weights are a mean over: answers, unless a subclass says otherwise.

        By it rollouts of several micro-batches or ranks become one mean.
        """
        return len(mask)

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


class ConstantLength(Aggregation):
    """``dr_grpo``: the sum over tokens divided by a constant, the same for short and long answers (arXiv 2503.20783).

    Args:
        length: the largest number of tokens that an answer may have.
    """

    def __init__(self, length: Count) -> None:
        self.length = length

    def __call__(self, mask: Tensor) -> Tensor:
        """1 / (R length)."""
        return mask.float() / (len(mask) * self.length)


class TokenMean(Aggregation):
    """``dapo``: the mean over the tokens of all answers of a step, of which a long one weighs more (arXiv 2503.14476; T2I-R1)."""

    def count(self, mask: Tensor) -> Tensor:
        """Tokens."""
        return mask.sum()

    def __call__(self, mask: Tensor) -> Tensor:
        """1 / (number of tokens)."""
        return mask.float() / mask.sum().clamp(min=1)


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimate of KL(pi || reference) from one draw: ``rho - log rho - 1``, ``rho = reference / pi``; never negative."""
    gap = reference - log_probs
    return gap.exp() - gap - 1


def clipped_gains(ratios: Tensor, gains: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """``min(r A, clip(r, 1 - c, 1 + c) A)``, and where the clip is active (bool): no gradient flows there."""
    whole, clipped = ratios * gains, ratios.clamp(1 - clip, 1 + clip) * gains
    return torch.minimum(whole, clipped), clipped < whole


class GRPO:
    """Clipped policy gradient with advantages relative to the group of answers to the same prompt; no value network.

    ``- sum_t w_t [ min(r_t A, clip(r_t, 1 - c, 1 + c) A) - beta k3_t ]``, the weights w being the aggregation's and r_t the ratio
    ``pi / pi_old`` of a token. With one update per rollout every ratio is exactly 1 and only its gradient counts. Eq. 3 of the
    DeepSeekMath paper, which UAE adopts by citing it.

    Reference: Shao et al., "DeepSeekMath" (arXiv 2402.03300); Yan et al., "UAE" (arXiv 2509.09666).

    Args:
        advantage: of a sample in its group; None is ``GroupStandardised``.
        aggregation: weights of the tokens; None is ``SequenceMean``, the paper's literal objective.
        clip: c; UAE leaves it open, 0.2 is what DeepSeekMath's parents use.
        kl_weight: beta; 1e-6 in UAE, which is almost none.

    Shape:
        - log_probs, old, reference, mask, weights: ``[R, T]``, R = B * G answers, the G of one prompt next to each other
        - advantages: ``[R]``
    """

    def __init__(
        self,
        advantage: Advantage | None = None,
        aggregation: Aggregation | None = None,
        clip: Weight = 0.2,
        kl_weight: Weight = 1e-6,
    ) -> None:
        self.advantage = advantage or GroupStandardised()
        self.aggregation = aggregation or SequenceMean()
        self.clip, self.kl_weight = clip, kl_weight

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
            log_probs: of the sampled tokens under the policy, with a gradient.
            mask: True on the tokens of an answer, its end token included.
            advantages: of the rows.
            old: log-probabilities under the policy that sampled them; None where that is this very policy.
            reference: those under the reference policy; None leaves the KL out.
            weights: of the tokens in the whole rollout; None aggregates over these rows alone.

        Returns:
            ``loss``; and without gradient ``clip_fraction`` and ``kl``, weighted means over the tokens of these rows.
        """
        old = log_probs.detach() if old is None else old
        weights = self.aggregation(mask) if weights is None else weights
        gains = advantages[:, None].to(log_probs.dtype)
        ratios = (log_probs - old).masked_fill(~mask, 0.0).exp()  # [R, T]
        surrogate, active = clipped_gains(ratios, gains, self.clip)
        divergence = torch.zeros_like(surrogate)
        if reference is not None:
            divergence = k3(log_probs, reference.detach()).masked_fill(~mask, 0.0)
        terms = (surrogate - self.kl_weight * divergence).masked_fill(~mask, 0.0)
        share = (weights / weights.sum().clamp(min=1e-12)).detach()
        return {
            "loss": -(weights * terms).sum(),
            "clip_fraction": (share * (active & mask)).sum(),
            "kl": (share * divergence.detach()).sum(),
        }
