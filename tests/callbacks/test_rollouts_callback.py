"""Rollouts scored while training, and the guard that ends a collapsed run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from umm_zoo.batch import Batch
from umm_zoo.callbacks.rollouts import CollapseGuard, RolloutMetrics
from umm_zoo.errors import UserError
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.caption_metrics import CaptionClauses

SCENE = {"background": "grey", "objects": [{"cell": "top left", "size": "small", "colour": "red", "shape": "circle"}]}


class Policy(lightning.LightningModule):
    """Logs the given numbers, step by step."""

    def __init__(self, spreads: list[float], losses: list[float] | None = None) -> None:
        super().__init__()
        self.weight, self.spreads, self.losses = torch.nn.Parameter(torch.ones(())), spreads, losses or []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.losses[batch_idx] if batch_idx < len(self.losses) else 1.0
        self.log("train/loss", torch.tensor(loss))
        self.log("train/reward_std", torch.tensor(self.spreads[batch_idx]))
        return self.weight**2

    def rollout_outputs(self) -> tuple[Outputs, Batch]:
        return Outputs(answers=["top left: a small red circle"]), Batch(["a"], [[]], meta=[{"scene": SCENE}])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(
    method: lightning.LightningModule, callback: lightning.Callback, folder: Path, steps: int = 12, accumulated: int = 1
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulated,
        default_root_dir=folder,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(method, DataLoader(torch.zeros(steps * accumulated, 1), batch_size=1))
    return trainer


def test_a_run_without_spread_ends_and_names_the_last_good_checkpoint(tmp_path):
    spreads = [0.1] * 6 + [0.0] * 6
    with pytest.raises(UserError, match=r"step 9: collapsed: rewards differ by 0 .*good.ckpt \(step 6\)"):
        fit(Policy(spreads), CollapseGuard(patience=3, save_every_n_steps=2), tmp_path)
    good = torch.load(tmp_path / "checkpoints" / "good.ckpt", weights_only=False)
    assert good["global_step"] == 6


def test_patience_starts_over_after_a_good_step(tmp_path):
    trainer = fit(Policy([0.0, 0.0, 0.1] * 4), CollapseGuard(patience=3), tmp_path)
    assert trainer.global_step == 12


def test_a_loss_that_is_no_number_ends_at_once(tmp_path):
    with pytest.raises(UserError, match=r"step 3: collapsed: train/loss is no number; none was good"):
        fit(Policy([0.1] * 12, [1.0, 1.0, math.nan]), CollapseGuard(), tmp_path)


def test_judgement():
    guard = CollapseGuard(min_entropy=0.05)
    assert guard.judge({"train/reward_std": 0.1, "train/entropy": 0.04})[1].startswith("the entropy is 0.04")
    assert guard.judge({"train/loss": 1.0}) == (False, "")
    assert guard.judge({"train/reward": math.inf})[0]


def test_rollouts_are_scored(tmp_path):
    trainer = fit(Policy([0.1] * 12), RolloutMetrics({"clauses": CaptionClauses()}, every_n_steps=4), tmp_path)
    assert trainer.callback_metrics["rollout/clauses/precision"] == 1
    with pytest.raises(UserError, match="LightningModule, which has no rollouts"):
        RolloutMetrics({}).on_train_start(trainer, lightning.LightningModule())


def test_the_guard_counts_steps_not_micro_batches(tmp_path):
    with pytest.raises(UserError, match=r"step 5: collapsed"):
        fit(Policy([0.1] * 4 + [0.0] * 20), CollapseGuard(patience=3, save_every_n_steps=2), tmp_path, accumulated=2)


def test_the_guard_of_a_resumed_run_knows_what_was(tmp_path):
    one, other = CollapseGuard(patience=3, save_every_n_steps=2), CollapseGuard(patience=3, save_every_n_steps=2)
    fit(Policy([0.1, 0.1, 0.0, 0.0]), one, tmp_path, steps=4)
    other.load_state_dict(one.state_dict())
    with pytest.raises(UserError, match=r"step 1: collapsed: .*good.ckpt \(step 2\)"):
        fit(Policy([0.0] * 4), other, tmp_path, steps=4)


def test_rollouts_are_scored_once_a_step(tmp_path):
    callback, method = RolloutMetrics({"clauses": CaptionClauses()}, every_n_steps=2), Policy([0.1] * 12)
    scored = []
    method.rollout_outputs = lambda: scored.append(method.trainer.global_step)
    fit(method, callback, tmp_path, steps=4, accumulated=3)
    assert scored == [2, 4]
