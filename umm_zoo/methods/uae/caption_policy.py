"""Captions as actions of a language model: sampled in groups, scored again with a gradient."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.generation import Samples, take_rows
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.prefix import evaluation_mode
from umm_zoo.batch import Images
from umm_zoo.methods.uae.base import UAEBase
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.reinforcement import Reinforcement, Rollout, check_reference
from umm_zoo.methods.uae.renderers import Renderer
from umm_zoo.methods.uae.rollouts import EqualSamples, GroupNoise, Phases, Rollouts, portions_of_equals
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.rewards.base import Reward


@dataclass(kw_only=True)
class CaptionRollout(Rollout):
    """Rollout of G captions of each row, with the prompts of the language model.

    Shape:
        - inputs: the B prompts, embedded; no graph
        - samples: R captions; weights ``[R, T]`` of their tokens in the loss
        - old: ``[R, T]`` log-probabilities under the policy that wrote, once they are needed; None before
    """

    inputs: VLMInputs
    samples: Samples
    weights: Tensor
    old: Tensor | None = None


C = TypeVar("C", bound=CaptionRollout)


class CaptionPolicy(UAEBase, Reinforcement[C], ABC, Generic[C]):
    """Stage of GRPO on the captions of a language model; a subclass says what is made of them, and what else is scored.

    Args:
        vlm, renderer, captions, reward: see ``UAEBase``.
        objective: of the tokens.
        adapter: None trains the weights themselves.
        rollouts: groups and their use; None is groups of 4.
        noise: of a group, where ``rollouts`` says nothing of it.

    Raises:
        ValueError: sizes disagree, captions without chance, or a KL without an adapter to switch off.
    """

    objective: GRPO

    def __init__(
        self,
        vlm: LibraryVLM,
        renderer: Renderer,
        reward: Reward,
        objective: GRPO,
        adapter: LoRA | None,
        captions: CaptionSampling | None,
        rollouts: Rollouts | None,
        noise: GroupNoise,
    ) -> None:
        check_reference(objective.kl_weight, adapter, "an adapter")
        super().__init__(vlm, renderer, captions=captions, adapter=adapter, reward=reward)
        if self.captions.temperature <= 0:
            raise ValueError(f"captions.temperature: found {self.captions.temperature}, expected more than 0")
        self.objective, self.rollouts, self.phases = objective, rollouts or Rollouts(group=4), Phases()
        self.noise = self.rollouts.noise or noise

    def write(self, images: Images) -> tuple[VLMInputs, Samples]:
        """The prompts and G captions of each of B images."""
        with self.phases("caption", self.device):
            inputs = self._questions(images)
            how = self.captions
            return inputs, self.vlm.sample_from(inputs, self.rollouts.group, how.max_new_tokens, how.temperature)

    def _questions(self, images: Images) -> VLMInputs:
        """The prompts, once per image."""
        count = len(images)
        with evaluation_mode(self.vlm):
            return self.vlm.embed(self.captions.conversations(count), images, [1] * count, for_generation=True)

    # -- scoring -------------------------------------------------------------------------------------------------------------

    def scored(self, advantages: Tensor) -> Tensor:
        """Samples that are scored, ``[R]`` bool: one whose group is all alike has no gradient, unless through the KL."""
        return torch.ones_like(advantages, dtype=torch.bool) if self.objective.kl_weight else advantages != 0

    def counts(self, rollout: C) -> dict[str, float]:
        """Rows, tokens, what the aggregation is a mean over, and the weight of the tokens in it."""
        mask, aggregated = rollout.samples.mask, float(self.objective.aggregation.count(rollout.samples.mask))
        weight = aggregated * float(rollout.weights.sum())
        return {"rows": len(rollout.rewards), "tokens": float(mask.sum()), "aggregated": aggregated, "weight": weight}

    def described(self, rollout: C) -> dict[str, tuple[Tensor, str]]:
        """As ``Reinforcement``'s; also lengths and entropy of the captions."""
        samples = rollout.samples
        lengths = samples.mask.sum(dim=1).float()
        return {
            **super().described(rollout),
            "caption_tokens": (lengths.mean(), "rows"),
            "at_limit": ((lengths == self.captions.max_new_tokens).float().mean(), "rows"),
            # minus the log-probability of the sampled tokens: the entropy's unbiased estimate, per token
            "entropy": (-samples.log_probs.sum() / samples.mask.sum().clamp(min=1), "tokens"),
        }

    def caption_parts(self, rollout: C, weight: float = 1.0) -> list[Callable[[], dict[str, Tensor]]]:
        """One part of the loss per portion of captions, whose advantages count ``weight`` times."""
        if self.rollouts.updates_per_rollout > 1 and rollout.old is None:
            rollout.old = torch.zeros_like(rollout.samples.log_probs)
        rows = self.scored(rollout.advantages).nonzero()[:, 0]
        written = rollout.samples.tokens.masked_fill(~rollout.samples.mask, -1)[rows].tolist()
        kinds = zip((rows // self.rollouts.group).tolist(), map(tuple, written), strict=True)
        some = portions_of_equals(rows, kinds, self.rollouts.micro_batch)
        return [partial(self._part, rollout, weight * rollout.advantages, own) for own in some]

    def _part(self, rollout: C, advantages: Tensor, some: EqualSamples) -> dict[str, Tensor]:
        """The share of some captions in the loss."""
        tokens, mask = rollout.samples.tokens[some.firsts], rollout.samples.mask[some.firsts]
        length = int(mask.sum(dim=1).max())
        tokens, mask = tokens[:, :length], mask[:, :length]
        groups, owners = (some.firsts // self.rollouts.group).unique(return_inverse=True)
        prompts, rows = self._prompts(rollout, groups), some.rows

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

    def _prompts(self, rollout: C, groups: Tensor) -> VLMInputs:
        """The prompts of some rows; with a graph where an embedding or the tower is trained, otherwise as they were encoded."""
        if {"vision_tower", "projector", "language_model"} & self.changing:
            return self._questions([rollout.images[row] for row in groups.tolist()])
        return take_rows(rollout.inputs, groups)

    def log_probs(self, prompts: VLMInputs, tokens: Tensor, mask: Tensor, owners: Tensor) -> Tensor:
        """Of sampled tokens ``[R, T]``, each behind the prompt that it is one of the ``owners`` ``[R]`` of: ``[R, T]``."""
        return self.vlm.answer_log_probs(prompts, tokens, mask, owners, self.captions.temperature)
