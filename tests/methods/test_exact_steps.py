"""An optimiser step is the same however its rows are shared out over micro-batches."""

from __future__ import annotations

import lightning
import pytest
import torch
from lightning import LightningDataModule
from torch.testing import assert_close
from torch.utils.data import DataLoader

from tests.methods.test_llava_method import batch_of, method
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.objectives.step import whole_steps

LENGTHS = [1, 7, 2, 1, 11, 3]  # words of the answers


def rows() -> Batch:
    batch = batch_of(["red", "blue", "green", "red", "blue", "green"])
    for conversation, length in zip(batch.conversations, LENGTHS, strict=True):
        conversation[1]["text"] = " ".join(["red"] * length)
    return batch


def parts_of(batch: Batch, sizes: list[int]) -> list[Batch]:
    places = torch.arange(len(batch)).split(sizes)
    return [batch.select(part.tolist()) for part in places]


class Data(LightningDataModule):
    def __init__(self, batches: list[Batch], per_step: int) -> None:
        super().__init__()
        self.batches, self.per_step = batches, per_step

    def train_dataloader(self):
        batches = list(whole_steps(self.batches, self.per_step)) if self.per_step > 1 else self.batches
        return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


def trainer_of(**more: int) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(accelerator="cpu", **quiet, **more)


def trained(sizes: list[int], monkeypatch=None) -> tuple[dict[str, torch.Tensor], list[float]]:
    own, logged = method(["projector", "language_model"]).train(), []
    own.log_dict = lambda values, **_: logged.append(float(values["train/loss"]))
    own.log = lambda *_, **__: None
    trainer = trainer_of(max_epochs=1, accumulate_grad_batches=len(sizes))
    trainer.fit(own, datamodule=Data([*parts_of(rows(), sizes), *parts_of(rows(), sizes)], len(sizes)))
    assert trainer.global_step == 2
    return own.state_dict(), logged


@pytest.mark.parametrize("sizes", [[1, 5], [3, 2, 1], [1, 1, 1, 1, 1, 1]])
def test_accumulated_steps_of_unequal_answers_are_the_steps_of_the_whole(sizes):
    (expected, losses), (found, logged) = trained([6]), trained(sizes)
    assert logged == pytest.approx(losses, abs=1e-6)
    for name, value in expected.items():
        assert_close(found[name], value, atol=1e-5, rtol=0)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens():
    own, batch = method(["projector"]).train(), rows()
    nll = own.validation_step(batch, 0).nll.sum() / sum(length + 1 for length in LENGTHS)  # the end of a turn is a token
    assert trained([1, 5])[1][0] == pytest.approx(float(nll), abs=1e-5)


def broken(own, at: int):
    calls, losses = [], own.training_losses

    def training_losses(batch):
        calls.append(batch.keys)
        found = losses(batch)
        return {**found, "loss": found["loss"] * float("nan")} if len(calls) == at else found

    own.training_losses = training_losses


def fit(own, steps: int = 4):
    trainer = trainer_of(max_steps=steps, accumulate_grad_batches=2)
    trainer.fit(own, datamodule=Data(parts_of(rows(), [1, 2, 1, 2]) * 2, 2))


def test_a_loss_that_is_not_finite_ends_the_run_with_step_term_and_keys():
    own = method(["projector"]).train()
    broken(own, at=4)
    before = {name: value.clone() for name, value in own.vlm.parts()["projector"].state_dict().items()}
    with pytest.raises(UserError, match=r"step 2: found loss is nan in the batch of 4, 5, expected finite losses"):
        fit(own)
    assert all(value.isfinite().all() for value in own.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in own.vlm.parts()["projector"].state_dict().items())


def test_a_skipped_step_leaves_weights_and_moments_as_they_were():
    one, other = method(["projector"]).train(), method(["projector"]).train()
    one.step.skips_left = 3
    broken(one, at=2)  # the whole first step
    fit(one, steps=2)
    trainer = trainer_of(max_steps=1, accumulate_grad_batches=2)
    trainer.fit(other, datamodule=Data(parts_of(rows().select([3, 4, 5]), [1, 2]), 2))
    assert one.step.skips_left == 2
    for name, value in other.state_dict().items():
        assert_close(one.state_dict()[name], value, atol=1e-7, rtol=0)


def test_more_bad_steps_than_may_be_skipped_end_the_run():
    own = method(["projector"]).train()
    own.step.skips_left = 0
    broken(own, at=2)
    with pytest.raises(UserError, match="max_skipped_steps"):
        fit(own)
