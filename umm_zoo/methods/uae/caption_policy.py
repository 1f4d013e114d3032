"""Captions as actions of a language model: sampled in groups, scored again with a gradient."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.generation import Samples, take_rows
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.prefix import evaluation_mode
from umm_zoo.batch import Images
from umm_zoo.methods.uae.base import UAEBase
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.reinforcement import check_reference
from umm_zoo.methods.uae.renderers import Renderer
from umm_zoo.methods.uae.rollouts import GroupNoise, Phases, Rollouts
from umm_zoo.methods.uae.token_policy import TextPolicy, TextRollout
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.rewards.base import Reward


@dataclass(kw_only=True)
class CaptionRollout(TextRollout):
    """Rollout of G captions of each row."""


C = TypeVar("C", bound=CaptionRollout)


class CaptionPolicy(UAEBase, TextPolicy[C], ABC, Generic[C]):
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
        self.noise, self.writing = self.rollouts.noise or noise, self.captions

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

    def prompts_of(self, rollout: C, groups: Tensor) -> VLMInputs:
        """The prompts of some rows; with a graph where an embedding or the tower is trained, otherwise as they were encoded."""
        if {"vision_tower", "projector", "language_model"} & self.changing:
            return self._questions([rollout.images[row] for row in groups.tolist()])
        return take_rows(rollout.inputs, groups)
