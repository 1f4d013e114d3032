"""The step time and its parts, on a clock that only the parts below move: real ones are not exact on a busy machine."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from toy_parts import OneWeight

from umm_zoo.batch import Batch
from umm_zoo.callbacks.throughput import Throughput
from umm_zoo.outputs import Outputs

DATA, FORWARD, STEP, VALIDATION = 0.006, 0.012, 0.009, 0.2


class Clock:
    now = 100.0

    @classmethod
    def wait(cls, seconds: float) -> None:
        cls.now += seconds


class SlowSGD(torch.optim.SGD):
    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        loss = super().step(closure)
        Clock.wait(STEP)
        return loss


class Slow(OneWeight):
    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        Clock.wait(FORWARD)
        self.num_tokens = torch.tensor(7 * len(batch))
        return super().training_losses(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        Clock.wait(VALIDATION)
        return super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SlowSGD(self.parameters(), lr=0.1)


def rows(indices: list[int]) -> Batch:
    Clock.wait(DATA)
    return Batch(keys=[str(i) for i in indices], conversations=[[] for _ in indices])


@pytest.fixture(autouse=True)
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Throughput, "_now", lambda self: Clock.now)


def run(tmp_path: Path, callback: Throughput, **options: object) -> dict[str, float]:
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[callback], logger=CSVLogger(tmp_path), max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(Slow(), DataLoader(range(72), batch_size=3, collate_fn=rows), DataLoader(range(1), collate_fn=rows))
    return {key.removeprefix("throughput/"): value for key, value in callback.values.items()}


def test_the_parts_add_up_to_the_step_and_validation_is_no_part(tmp_path: Path) -> None:
    # of 24 steps the last 12 are looked at: in the first the loader has already begun
    values = run(tmp_path, Throughput(every_n_steps=12), val_check_interval=4)
    parts = [values["data_ms"], values["forward_backward_ms"], values["optimiser_ms"]]
    assert parts == pytest.approx([6.0, 12.0, 9.0])
    assert values["step_ms"] == pytest.approx(27.0)
    assert values["samples_per_s"] == pytest.approx(3 / 0.027)
    assert values["tokens_per_s"] == pytest.approx(21 / 0.027)
    assert 0.05 < values["peak_memory_gb"] < 50
    assert "throughput/step_ms" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_a_step_of_four_micro_batches_is_one_step(tmp_path: Path) -> None:
    values = run(tmp_path, Throughput(every_n_steps=3), accumulate_grad_batches=4)  # 6 steps of 4 x 3 rows
    parts = [values["data_ms"], values["forward_backward_ms"], values["optimiser_ms"]]
    assert parts == pytest.approx([4 * 6.0, 4 * 12.0, 9.0])
    assert values["step_ms"] == pytest.approx(81.0)
    assert values["samples_per_s"] == pytest.approx(12 / 0.081)
    assert len((next(tmp_path.rglob("metrics.csv"))).read_text().splitlines()) == 3  # the header, and entries at steps 3 and 6
