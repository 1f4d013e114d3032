"""Callbacks of reinforcement: metrics of rollouts while training, and the end of a run that has collapsed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torchmetrics import Metric

from umm_zoo.callbacks.metrics import logged, or_nan
from umm_zoo.callbacks.steps import StepCallback
from umm_zoo.errors import Count, UserError, Weight
from umm_zoo.outputs import RollsOut


class RolloutMetrics(StepCallback):
    """Callback that scores the rollouts of training with metrics of validation, and logs ``rollout/<name>/<entry>``.

    What is scored is what ``rollout_outputs`` of the method gives (see ``outputs.RollsOut``): the first sample of each row of the
    last rollout, with its batch. Each value is that of one batch of training, the last of its step, over all ranks.

    Args:
        metrics: by the name they are logged under.
        every_n_steps: optimiser steps between two scorings.

    Raises:
        UserError: the method has no rollouts.
    """

    def __init__(self, metrics: dict[str, Metric], every_n_steps: Count = 10) -> None:
        self.metrics, self.every_n_steps = dict(metrics), every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once whether there is anything to score."""
        if not isinstance(pl_module, RollsOut):
            found = f"RolloutMetrics with a {type(pl_module).__name__}, which has no rollouts"
            raise UserError("callbacks", found, "a method that trains on its own samples")
        for metric in self.metrics.values():
            metric.to(pl_module.device)
        super().on_train_start(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score and log."""
        if trainer.global_step % self.every_n_steps or not isinstance(pl_module, RollsOut):
            return
        if (found := pl_module.rollout_outputs()) is None:
            return
        outputs, batch = found
        for name, metric in self.metrics.items():
            metric.reset()
            metric.update(outputs, batch)
            for key, number in logged("rollout", name, or_nan(metric.compute())).items():
                pl_module.log(key, torch.tensor(number), batch_size=1)


class CollapseGuard(StepCallback):
    """Callback that stops a run whose rewards are alike within groups, whose captions are certain, or whose loss is no number.

    While all is well it keeps ``checkpoints/good.ckpt``; the message of the end names it. Every rank must have collapsed.

    Args:
        min_reward_std: mean deviation of the rewards of a group below which there is nothing to compare.
        min_entropy: of the policy, in nats per token; methods that log none are not judged by it.
        patience: steps in a row below either bound before the run is stopped; a loss that is no number stops it at once.
        save_every_n_steps: steps between two savings of the good checkpoint.

    Raises:
        UserError: at the end of such a step.
    """

    def __init__(
        self, min_reward_std: Weight = 1e-4, min_entropy: Weight = 0.01, patience: Count = 20, save_every_n_steps: Count = 25
    ) -> None:
        self.min_reward_std, self.min_entropy = min_reward_std, min_entropy
        self.patience, self.save_every_n_steps = patience, save_every_n_steps
        self.bad_steps, self.saved_at = 0, 0

    def state_dict(self) -> dict[str, Any]:
        """What is known of the steps so far."""
        return {"bad_steps": self.bad_steps, "saved_at": self.saved_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        self.bad_steps, self.saved_at = state_dict["bad_steps"], state_dict["saved_at"]

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the step."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        broken, reason = self.judge(values)
        self.bad_steps = self.bad_steps + 1 if reason else 0
        if trainer.strategy.reduce_boolean_decision(broken or self.bad_steps >= self.patience):
            kept = f"the last good checkpoint is {self._path(trainer)} (step {self.saved_at})" if self.saved_at else "none was good"
            raise UserError(trainer.default_root_dir, f"step {trainer.global_step}: collapsed: {reason}; {kept}")
        healthy = not reason and trainer.global_step % self.save_every_n_steps == 0 and trainer.global_step > self.saved_at
        if trainer.strategy.reduce_boolean_decision(healthy):
            trainer.save_checkpoint(self._path(trainer))
            self.saved_at = trainer.global_step

    def judge(self, values: dict[str, float]) -> tuple[bool, str]:
        """Whether the numbers of a step end the run at once, and what is wrong with them (empty where nothing is)."""
        wrong = [name for name in ("train/loss", "train/reward") if not math.isfinite(values.get(name, 0.0))]
        if wrong:
            return True, f"{wrong[0]} is no number"
        if (spread := values.get("train/reward_std", math.inf)) < self.min_reward_std:
            return False, f"rewards differ by {spread:.2g} within a group (bound {self.min_reward_std:g})"
        if (entropy := values.get("train/entropy", math.inf)) < self.min_entropy:
            return False, f"the entropy is {entropy:.2g} nats per token (bound {self.min_entropy:g})"
        return False, ""

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" / "good.ckpt"
