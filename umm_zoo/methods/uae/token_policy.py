"""Texts as actions of a language model: sampled in groups, scored again with a gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.generation import Samples
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.methods.uae.reinforcement import Reinforcement, Rollout
from umm_zoo.methods.uae.rollouts import EqualSamples, portions_of_equals
from umm_zoo.objectives.grpo import GRPO


@dataclass(kw_only=True)
class TextRollout(Rollout):
    """Rollout of G texts for each row, with the prompts of the language model.

    Shape:
        - inputs: the B prompts, embedded; no graph
        - samples: R texts; weights ``[R, T]`` of their tokens in the loss
        - old: ``[R, T]`` log-probabilities under the policy that wrote, once they are needed; None before
    """

    inputs: VLMInputs
    samples: Samples
    weights: Tensor
    old: Tensor | None = None


class Writing(Protocol):
    """Length and temperature of what is written."""

    @property
    def max_new_tokens(self) -> int:
        """Longest text."""

    @property
    def temperature(self) -> float:
        """Of the draws."""


T = TypeVar("T", bound=TextRollout)


class TextPolicy(Reinforcement[T], Generic[T]):
    """Method of GRPO on texts that a language model writes; a subclass says what about, and what is made of them.

    Attributes:
        vlm: writes.
        adapter: trained; None trains the weights themselves, and knows no reference policy.
        objective: of the tokens.
        writing: how they are drawn.
    """

    vlm: LibraryVLM
    adapter: LoRA | None
    objective: GRPO
    writing: Writing

    @abstractmethod
    def prompts_of(self, rollout: T, groups: Tensor) -> VLMInputs:
        """The prompts of some rows; with a graph where what embeds them is trained."""

    # -- scoring -------------------------------------------------------------------------------------------------------------

    def scored(self, advantages: Tensor) -> Tensor:
        """Samples that are scored, ``[R]`` bool: one whose group is all alike has no gradient, unless through the KL."""
        return torch.ones_like(advantages, dtype=torch.bool) if self.objective.kl_weight else advantages != 0

    def counts(self, rollout: T) -> dict[str, float]:
        """Rows, tokens, what the aggregation is a mean over, and the weight of the tokens in it."""
        mask, aggregated = rollout.samples.mask, float(self.objective.aggregation.count(rollout.samples.mask))
        weight = aggregated * float(rollout.weights.sum())
        return {"rows": len(rollout.rewards), "tokens": float(mask.sum()), "aggregated": aggregated, "weight": weight}

    def described(self, rollout: T) -> dict[str, tuple[Tensor, str]]:
        """As ``Reinforcement``'s; also lengths and entropy of the texts."""
        samples = rollout.samples
        lengths = samples.mask.sum(dim=1).float()
        return {
            **super().described(rollout),
            "caption_tokens": (lengths.mean(), "rows"),
            "at_limit": ((lengths == self.writing.max_new_tokens).float().mean(), "rows"),
            # minus the log-probability of the sampled tokens: the entropy's unbiased estimate, per token
            "entropy": (-samples.log_probs.sum() / samples.mask.sum().clamp(min=1), "tokens"),
        }

    def text_parts(self, rollout: T, weight: float = 1.0) -> list[Callable[[], dict[str, Tensor]]]:
        """One part of the loss per portion of texts, whose advantages count ``weight`` times."""
        if self.rollouts.updates_per_rollout > 1 and rollout.old is None:
            rollout.old = torch.zeros_like(rollout.samples.log_probs)
        rows = self.scored(rollout.advantages).nonzero()[:, 0]
        written = rollout.samples.tokens.masked_fill(~rollout.samples.mask, -1)[rows].tolist()
        kinds = zip((rows // self.rollouts.group).tolist(), map(tuple, written), strict=True)
        some = portions_of_equals(rows, kinds, self.rollouts.micro_batch)
        return [partial(self._part, rollout, weight * rollout.advantages, own) for own in some]

    def _part(self, rollout: T, advantages: Tensor, some: EqualSamples) -> dict[str, Tensor]:
        """The share of some texts in the loss."""
        tokens, mask = rollout.samples.tokens[some.firsts], rollout.samples.mask[some.firsts]
        length = int(mask.sum(dim=1).max())
        tokens, mask = tokens[:, :length], mask[:, :length]
        groups, owners = (some.firsts // self.rollouts.group).unique(return_inverse=True)
        prompts, rows = self.prompts_of(rollout, groups), some.rows

        def score() -> Tensor:
            return self.log_probs(prompts, tokens, mask, owners)[some.places]

        mask_of_all, first = mask[some.places], rollout.times_used == 0
        return self.surrogate(score, mask_of_all, advantages[rows], rollout.weights, rollout.old, rows, first)

    def surrogate(
        self,
        score: Callable[[], Tensor],
        mask: Tensor,
        advantages: Tensor,
        weights: Tensor,
        old: Tensor | None,
        rows: Tensor,
        first: bool,
    ) -> dict[str, Tensor]:
        """The share of some samples in the loss of a rollout: ``loss``, ``kl`` and ``clip_fraction``.

        Args:
            score: log-probabilities of their tokens, ``[r, t]``; under the reference policy once the adapter is switched off.
            mask, advantages: ``[r, t]`` and ``[r]``.
            weights: of the tokens of all samples, ``[R, T]``.
            old: ``[R, T]``, filled in at the first use of the rollout: in the training geometry, never by the sampler; None where
                every rollout is used once.
            rows: numbers of the samples.
            first: whether this is the first use.
        """
        scored = score()
        reference = None
        if self.objective.kl_weight and self.adapter is not None:
            with torch.no_grad(), self.adapter.disabled():
                reference = score()
        length = scored.shape[1]
        if old is not None and first:
            old[rows, :length] = scored.detach().to(old.dtype)
        before = None if old is None else old[rows, :length]
        own = weights[rows, :length]
        out = self.objective(scored, mask, advantages, before, reference, own)
        share = own.sum() / weights.sum().clamp(min=1e-12)
        return {"loss": out["loss"], "kl": share * out["kl"], "clip_fraction": share * out["clip_fraction"]}

    def log_probs(self, prompts: VLMInputs, tokens: Tensor, mask: Tensor, owners: Tensor) -> Tensor:
        """Of sampled tokens ``[R, T]``, each behind the prompt that it is one of the ``owners`` ``[R]`` of: ``[R, T]``."""
        return self.vlm.answer_log_probs(prompts, tokens, mask, owners, self.writing.temperature)
