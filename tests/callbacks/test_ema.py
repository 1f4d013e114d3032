"""The moving average of the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from umm_zoo.training.ema import EMA


class Ramp(LightningModule):
    """Its one weight falls by 1 per step, from 0; the frozen one stays."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.weight[0].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1.0)


def fit(model: Ramp, callback: EMA, folder: Path, steps: int, **options: Any) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[callback], logger=False, max_steps=steps, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, val_check_interval=5,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.zeros(60), batch_size=2), DataLoader(torch.zeros(1)), **options)
    return trainer


def average_of_the_library(steps: int, decay: float) -> float:
    weight = nn.Parameter(torch.zeros(1))
    average = EMAModel([weight], decay=decay)
    for _ in range(steps):
        weight.data -= 1.0
        average.step([weight])
    return average.shadow_params[0].item()


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.4, 0.9999])
def test_validation_sees_the_average_and_training_goes_on_with_the_weights(decay: float, tmp_path: Path) -> None:
    model, callback = Ramp(), EMA(decay)
    fit(model, callback, tmp_path, steps=10)
    assert model.validated == pytest.approx([average_of_the_library(5, decay), average_of_the_library(10, decay)])
    assert model.weight.tolist() == [-10, -10]
    assert list(callback.averages) == ["weight"]


def test_a_resumed_run_ends_with_the_same_average(tmp_path: Path) -> None:
    whole = EMA(decay=0.9)
    fit(Ramp(), whole, tmp_path, steps=14)
    trainer = fit(Ramp(), EMA(decay=0.9), tmp_path, steps=8)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = EMA(decay=0.9)
    fit(Ramp(), resumed, tmp_path, steps=14, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(resumed.averages["weight"], whole.averages["weight"])
    assert resumed.updates == 14


def test_a_checkpoint_written_during_validation_holds_the_raw_weights(tmp_path: Path) -> None:
    class Saver(Ramp):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    fit(Saver(), EMA(decay=0.9), tmp_path, steps=5)
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"].tolist() == [-5, -5]


def test_averages_of_other_parameters_are_refused(tmp_path: Path) -> None:
    callback = EMA()
    callback.load_state_dict({"updates": 3, "averages": {"weigth": torch.zeros(2)}})
    with pytest.raises(ValueError, match="differ in 2, such as 'weight'"):
        fit(Ramp(), callback, tmp_path, steps=1)
