"""The timing tool, on a method and data of a few numbers."""

from pathlib import Path

import pytest
import yaml

from tools import benchmark_fit as tool
from umm_zoo.errors import UserError

TOY = """
import torch
from lightning import LightningDataModule
from torch import nn
from umm_zoo.batch import Batch
from umm_zoo.method import Method
from umm_zoo.outputs import Outputs

class Line(Method):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def parts(self) -> dict[str, nn.Module]:
        return {"layer": self.layer}

    def training_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(batch.extras["x"]).square().mean()}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        return Outputs(self.training_losses(batch))

class Numbers(LightningDataModule):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        while True:
            yield Batch(keys=["a"], conversations=[[]], extras={"x": torch.randn(1, 3, generator=generator)})
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "benchmark_toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    tree = {"method": {"_target_": "benchmark_toy.Line"}, "data": {"_target_": "benchmark_toy.Numbers"}}
    tree["training"] = {"trained": ["layer"], "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 0.1}}
    tree["trainer"] = {"accelerator": "cpu", "gradient_clip_val": 0.1, "enable_progress_bar": False}
    Path("toy.yaml").write_text(yaml.safe_dump(tree))
    return "toy.yaml"


def test_both_sides_take_the_same_steps(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = tool.prepare(experiment, [], total=14)
    turns = tool.measure(prepared, warmup=2, block=4)
    assert len(turns.fit) == len(turns.bare) == 3
    assert len(turns.fit_losses) == len(turns.bare_losses) == 14
    assert all(seconds > 0 for seconds, _ in turns.fit + turns.bare)
    assert tool.report(turns, prepared, block=4, limit=1e9) == 0  # equal losses
    assert "ratio" in capsys.readouterr().out


def test_other_losses_or_a_slow_fit_fail(experiment: str) -> None:
    prepared = tool.prepare(experiment, [], total=5)
    turns = tool.measure(prepared, warmup=1, block=4)
    assert tool.report(turns, prepared, block=4, limit=1e-9) == 1
    turns.bare_losses[-1] += 1
    assert tool.report(turns, prepared, block=4, limit=1e9) == 1


def test_what_the_bare_loop_cannot_do_is_refused(experiment: str) -> None:
    with pytest.raises(UserError, match="accumulate_grad_batches"):
        tool.prepare(experiment, ["trainer.accumulate_grad_batches=2"], total=4)
