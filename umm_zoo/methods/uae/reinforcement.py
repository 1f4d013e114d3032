"""Base class of methods that learn from their own samples: roll out, reward, score in parts, use again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.methods.uae.rollout_state import plain, restored
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
        - images: B of ``[3, H, W]``, of any sizes, what the captions describe, or none; captions: R texts
        - generated: R images; rewards ``[B, G]``; advantages ``[R]``, once all micro-batches of the step are rolled out
    """

    batch: Batch
    images: list[Tensor]
    captions: Sequence[str]
    generated: list[Tensor]
    rewards: Tensor
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    times_used: int = 0


R = TypeVar("R", bound=Rollout)


class Reinforcement(Method, Generic[R]):
    """Method of policy gradients relative to a group of samples; a subclass says what is sampled and how it is scored.

    It knows no model. All micro-batches of an optimiser step are rolled out at its start, each of its own rows, so that advantages
    and means are those of the whole step. With several updates per rollout the next steps use the same rollouts again, micro-batch
    by micro-batch; checkpoints keep those that are not used up.

    Attributes:
        losses: terms of the loss that ``loss_parts`` give, and the unit (see ``counts``) that each is a mean over.
        watched: what they give beside the loss, and the unit of each.
        rollout_class: of the rollouts.
        reward: of what is generated.
        objective: whose advantages the samples get.
        rollouts: how many samples there are and how they are used.
        phases: seconds of each phase of the last update.
        window: rollouts in use, one for each micro-batch of a step.
        steps_begun: optimiser steps on them.
        rollout: the last one that was scored; None before the first.
    """

    losses: Mapping[str, str]
    watched: Mapping[str, str]
    rollout_class: type[R]
    reward: Reward | None
    objective: GRPO | FlowGRPO
    rollouts: Rollouts
    phases: Phases
    window: Sequence[R] = ()
    steps_begun: int = 0
    rollout: R | None = None
    _looked_ahead: bool = False
    _kept: dict[str, Any] | None = None  # of a checkpoint: when it is loaded the device is not known yet

    @abstractmethod
    def roll_out(self, batch: Batch) -> R:
        """Samples of a batch and their rewards; no gradient, and no advantages yet."""

    @abstractmethod
    def counts(self, rollout: R) -> dict[str, float]:
        """Units by name of what the terms of the loss and the values to watch are means over; ``rows`` among them."""

    @abstractmethod
    def loss_parts(self, rollout: R) -> list[Callable[[], dict[str, Tensor]]]:
        """The loss of a rollout in parts that are scored one after the other, see ``portions_of``.

        Each gives its share of terms of the loss and, without gradient, of what is ``watched``.
        """

    def set_advantages(self, rollouts: Sequence[R]) -> None:
        """Give the rollouts of a step their advantages; one whose samples have a second part gives that its own here."""
        for rollout, own in zip(rollouts, self.advantages_of(rollouts, [one.rewards for one in rollouts]), strict=True):
            rollout.advantages = own

    def configure_model(self) -> None:
        """Refuse weights that are shared out.

        Raises:
            UserError: the strategy does; parts are scored in numbers that differ among ranks, which would wait for each other.
        """
        if self.device_mesh is not None:
            found = f"{type(self.trainer.strategy).__name__} with {type(self).__name__}"
            raise UserError("trainer.strategy", found, "ddp: ranks sample and score different numbers of tokens and rows")

    # -- rolling out ---------------------------------------------------------------------------------------------------------

    def begin_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Roll out the micro-batches of a step, unless earlier rollouts serve it too; their units."""
        self._next_step()
        self._roll_out(batches[len(self.window) :])
        self._looked_ahead = True
        counts = [self._counts(rollout) for rollout in self.window[: len(batches)]]
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    def _counts(self, rollout: R) -> dict[str, float]:
        counts = self.counts(rollout)
        return dict.fromkeys(counts, 0.0) if rollout.batch.stands_in else counts

    def _next_step(self) -> None:
        self.phases.clear()
        if self._kept is not None:
            self.window = [restored(self.rollout_class, rollout, self.device) for rollout in self._kept["window"]]
            self.steps_begun, self._kept = self._kept["steps_begun"], None
        if self.steps_begun >= self.rollouts.updates_per_rollout:
            self.window, self.steps_begun = (), 0
        self.steps_begun += 1

    def _roll_out(self, batches: Sequence[Batch]) -> None:
        """Put the rollouts of micro-batches, which are compared with one another, into the window."""
        if not batches:
            return
        fresh = [self.roll_out(replace(batch, ahead=None)) for batch in batches]
        torch.clear_autocast_cache()  # weights that were cast without gradient are kept without a graph
        self.set_advantages(fresh)
        self.window = [*self.window, *fresh]

    def advantages_of(
        self, rollouts: Sequence[R], rewards: Sequence[Tensor], objective: GRPO | FlowGRPO | None = None
    ) -> list[Tensor]:
        """Advantages of the rewards of each rollout among those of all, flat; 0 where rows stand in for others.

        Args:
            rollouts: of a step.
            rewards: of each, in groups ``[groups, samples of a group]``.
            objective: whose advantages they are; None is the method's own.
        """
        counted = [own[: 0 if one.batch.stands_in else None] for one, own in zip(rollouts, rewards, strict=True)]
        advantages = (objective or self.objective).advantage(torch.cat(counted)).flatten().split([own.numel() for own in counted])
        return [
            own.new_zeros(own.numel()) if one.batch.stands_in else found
            for one, own, found in zip(rollouts, rewards, advantages, strict=True)
        ]

    def judge(self, generated: list[Tensor], batch: Batch) -> Tensor:
        """Rewards of R generated images, row by row ``[B, R / B]``."""
        assert self.reward is not None
        with self.phases("reward", self.device):
            return self.reward(generated, batch).unflatten(0, (len(batch), -1))

    # -- scoring -------------------------------------------------------------------------------------------------------------

    def portions_of(self, chosen: Tensor) -> list[Tensor]:
        """Numbers of the samples that are scored, where ``chosen`` [R] is true, in micro-batches."""
        return portions(chosen.nonzero()[:, 0], self.rollouts.micro_batch)

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, and what to watch: rewards, their spread within groups, clipping, KL, seconds per phase.

        Outside of a training step, and where nobody could look ahead, the batch is rolled out now.
        """
        place = self.step.place
        if place == 0 and not self._looked_ahead:
            self._next_step()
        self._looked_ahead = False
        if place >= len(self.window):
            self._roll_out([batch])
        self.rollout = rollout = self.window[place]
        self.step.weightless = rollout.batch.stands_in
        # asked for once, whatever there is to score here: ranks may meet in it
        shares = {unit: self.share(unit, count) for unit, count in self._counts(rollout).items()}
        weights = {name: shares[unit] for name, unit in {**self.losses, **self.watched}.items()}
        logs: list[dict[str, Tensor]] = []

        def scored(part: Callable[[], dict[str, Tensor]]) -> Tensor:
            values = part()
            logs.append({name: value.detach() for name, value in values.items()})
            return torch.stack([weights[name] * values[name] for name in self.losses if name in values]).sum()

        with self.phases("score", self.device):
            parts = [partial(scored, part) for part in self.loss_parts(rollout)]
            # a single part keeps its graph; several give theirs up one after the other
            loss = parts[0]() if len(parts) == 1 else accumulated(parts, [p for p in self.parameters() if p.requires_grad])
        rollout.times_used += 1
        zero = loss.new_zeros(())
        return {
            **{name: weight * sum((log[name] for log in logs if name in log), start=zero) for name, weight in weights.items()},
            "loss": loss,
            **{name: value * shares[unit] for name, (value, unit) in self.described(rollout).items()},
            # the trainer's mean over micro-batches becomes their sum
            **{f"seconds/{name}": torch.tensor(value * self.step.micro_batches) for name, value in self.phases.latest().items()},
        }

    def described(self, rollout: R) -> dict[str, tuple[Tensor, str]]:
        """Means over the samples, each with its unit."""
        finite = rollout.rewards.nan_to_num(0.0)
        flat = (rollout.advantages.unflatten(0, finite.shape) == 0).all(dim=1)
        means = {"reward": finite.mean(), "reward_std": finite.std(dim=1).mean(), "zero_advantage": flat.float().mean()}
        return {name: (value, "rows") for name, value in means.items()}

    # -- between steps -------------------------------------------------------------------------------------------------------

    def run_state(self) -> dict[str, Any]:
        """Rollouts that later steps use, as plain values."""
        if self._kept is not None:
            return self._kept
        if not self.window or self.steps_begun >= self.rollouts.updates_per_rollout:
            return {}
        window = [plain(replace(rollout, generated=_shown(rollout))) for rollout in self.window]
        return {"micro_batches": self._micro_batches(), "steps_begun": self.steps_begun, "window": window}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Take the rollouts back; those of another number of micro-batches, of which some would not be used, are left out."""
        if state and state["micro_batches"] != self._micro_batches():
            found = f"of {state['micro_batches']} micro-batches, {self._micro_batches()} now"
            rank_zero_warn(f"the checkpoint's rollouts are left out: they are {found} (trainer.accumulate_grad_batches)")
        elif state:
            self._kept = state

    def _micro_batches(self) -> int:
        return 1 if self._trainer is None else self._trainer.accumulate_grad_batches

    def rollout_outputs(self) -> tuple[Outputs, Batch] | None:
        """The first sample of each row of the last rollout, and its batch; see ``outputs.RollsOut``."""
        if (rollout := self.rollout) is None:
            return None
        answers = list(rollout.captions[:: self.rollouts.group])
        return Outputs(answers=answers, generated=_shown(rollout), references=rollout.images or None), rollout.batch


def _shown(rollout: Rollout) -> list[Tensor]:
    """The first image of each row; a rollout that comes out of a checkpoint has no others."""
    return rollout.generated[:: len(rollout.generated) // len(rollout.batch)]


def check_reference(kl_weight: float, adapter: LoRA | None, name: str) -> None:
    """Raise a ``ValueError`` for a KL where there is no adapter to switch off."""
    if kl_weight and adapter is None:
        raise ValueError(
            f"objective.kl_weight: found {kl_weight}, expected 0 without {name}: the reference policy is the model with its "
            "adapter switched off"
        )
