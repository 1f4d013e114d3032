"""Base class of UAE's reinforcement stages: roll out, reward, score in parts, use again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.batch import Batch
from umm_zoo.methods.uae.base import UAEBase
from umm_zoo.methods.uae.rollouts import Phases, Rollouts, portions
from umm_zoo.objectives.accumulation import accumulated
from umm_zoo.objectives.flow_grpo import FlowGRPO
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.outputs import Outputs
from umm_zoo.rewards.base import Reward


@dataclass(kw_only=True)
class Rollout:
    """Samples of B rows, G of each, the images generated and their rewards. R = B * G, the samples of a row side by side.

    Shape:
        - images: ``[B, 3, H, W]``, what the captions describe; captions: R texts
        - generated: ``[R, 3, H, W]``; rewards ``[B, G]``; advantages ``[R]``
    """

    batch: Batch
    images: Tensor
    captions: Sequence[str]
    generated: Tensor
    rewards: Tensor
    advantages: Tensor
    times_used: int = 0


R = TypeVar("R", bound=Rollout)


class Reinforcement(UAEBase, Generic[R]):
    """Stage of policy gradients relative to a group of samples; a subclass says what is sampled and how it is scored.

    Attributes:
        watched: names of what ``loss_parts`` give beside the loss.
        rollouts: how many samples there are and how they are used.
        phases: seconds of each phase of the last update.
        rollout: the last one; None before the first.
    """

    watched: ClassVar[tuple[str, ...]]
    reward: Reward
    objective: GRPO | FlowGRPO
    rollouts: Rollouts
    phases: Phases
    rollout: R | None = None

    @abstractmethod
    def roll_out(self, batch: Batch) -> R:
        """Samples of a batch, without gradient."""

    @abstractmethod
    def loss_parts(self, rollout: R, rows: list[Tensor]) -> list[Callable[[], dict[str, Tensor]]]:
        """The loss in parts that are scored one after the other, from portions of the rows that carry a gradient.

        Each gives its share of ``loss`` and, without gradient, of what is ``watched``.
        """

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, and what to watch: rewards, their spread within groups, clipping, KL, seconds per phase."""
        self.phases.seconds.clear()
        if self.rollout is None or self.rollout.times_used >= self.rollouts.updates_per_rollout:
            self.rollout = self.roll_out(batch)
        rollout = self.rollout
        # a sample whose group is all alike carries no gradient, unless through the KL
        scored = torch.ones_like(rollout.advantages, dtype=torch.bool) if self.objective.kl_weight else rollout.advantages != 0
        logs: list[dict[str, Tensor]] = []
        with self.phases("score", self.device):
            rows = portions(scored.nonzero()[:, 0], self.rollouts.micro_batch)
            parts = [partial(_logged, part, logs) for part in self.loss_parts(rollout, rows)]
            # a single part keeps its graph; several give theirs up one after the other
            loss = parts[0]() if len(parts) == 1 else accumulated(parts, [p for p in self.parameters() if p.requires_grad])
        rollout.times_used += 1
        finite = rollout.rewards.nan_to_num(0.0)
        return {
            "loss": loss,
            "reward": finite.mean(),
            "reward_std": finite.std(dim=1).mean(),
            "zero_advantage": (rollout.advantages.unflatten(0, finite.shape) == 0).all(dim=1).float().mean(),
            **{name: torch.stack([log[name] for log in logs]).sum() if logs else loss.new_zeros(()) for name in self.watched},
            **{f"seconds/{name}": torch.tensor(value) for name, value in self.phases.seconds.items()},
        }

    def judge(self, generated: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rewards ``[B, G]`` and advantages ``[R]`` of generated images ``[R, 3, H, W]``."""
        with self.phases("reward", self.device):
            rewards = self.reward(generated, batch).unflatten(0, (len(batch), self.rollouts.group))
        return rewards, self.objective.advantage(rewards).flatten()

    def rollout_outputs(self) -> tuple[Outputs, Batch] | None:
        """The first sample of each row of the last rollout, and its batch; see ``outputs.RollsOut``."""
        if (rollout := self.rollout) is None:
            return None
        first = slice(None, None, self.rollouts.group)
        answers = list(rollout.captions[first])
        return Outputs(answers=answers, generated=rollout.generated[first], references=rollout.images), rollout.batch


def _logged(part: Callable[[], dict[str, Tensor]], logs: list[dict[str, Tensor]]) -> Tensor:
    logs.append(part())
    return logs[-1].pop("loss")


def check_reference(kl_weight: float, adapter: LoRA | None, name: str) -> None:
    """Raise a ``ValueError`` for a KL where there is no adapter to switch off."""
    if kl_weight and adapter is None:
        raise ValueError(
            f"objective.kl_weight: found {kl_weight}, expected 0 without {name}: the reference policy is the model with its "
            "adapter switched off"
        )
