"""The step time and its parts, on a clock that only the parts below move: real ones are not exact on a busy machine."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from toy_parts import OneWeight

from umm_zoo.batch import Batch
from umm_zoo.callbacks.throughput import Throughput
from umm_zoo.outputs import Outputs, TokenCount

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
    counting = True

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        Clock.wait(FORWARD)
        if self.counting:  # of twelve text tokens seven are useful; the device knows, as for a mask
            self.token_counts = {"text": TokenCount(torch.tensor(7 * len(batch)), 12 * len(batch)), "query": TokenCount(4, 4)}
        return super().training_losses(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        Clock.wait(VALIDATION)
        return super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SlowSGD(self.parameters(), lr=0.1)


def rows(indices: list[int]) -> Batch:
    """One image each, and every other row asks for one."""
    Clock.wait(DATA)
    image = torch.zeros(3, 2, 2)
    return Batch(
        keys=[str(i) for i in indices],
        conversations=[[] for _ in indices],
        images=[image] * len(indices),
        image_counts=[1] * len(indices),
        targets=[image if i % 2 else None for i in indices],
    )


def stand_ins(indices: list[int]) -> Batch:
    return replace(rows(indices), stands_in=indices[0] % 2 == 1)


@pytest.fixture(autouse=True)
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Throughput, "_now", lambda self: Clock.now)


def run(
    tmp_path: Path, callback: Throughput, method: Slow | None = None, collate: Callable[..., Batch] = rows, **options: object
) -> dict[str, float]:
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[callback], logger=CSVLogger(tmp_path), max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    loaders = DataLoader(range(72), batch_size=3, collate_fn=collate), DataLoader(range(1), collate_fn=rows)
    trainer.fit(method or Slow(), *loaders)
    return {key.removeprefix("throughput/"): value for key, value in callback.values.items()}


def test_the_parts_add_up_to_the_step_and_validation_is_no_part(tmp_path: Path) -> None:
    # of 24 steps the last 12 are looked at: in the first the loader has already begun
    values = run(tmp_path, Throughput(every_n_steps=12), val_check_interval=4)
    parts = [values["data_ms"], values["forward_backward_ms"], values["optimiser_ms"]]
    assert parts == pytest.approx([6.0, 12.0, 9.0])
    assert values["step_ms"] == pytest.approx(27.0)
    assert values["samples_per_s"] == pytest.approx(3 / 0.027)
    assert values["images_per_s"] == pytest.approx(4.5 / 0.027)
    assert 0.05 < values["peak_memory_gb"] < 50
    assert "throughput/step_ms" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_a_step_of_four_micro_batches_is_one_step(tmp_path: Path) -> None:
    values = run(tmp_path, Throughput(every_n_steps=3), accumulate_grad_batches=4)  # 6 steps of 4 x 3 rows
    parts = [values["data_ms"], values["forward_backward_ms"], values["optimiser_ms"]]
    assert parts == pytest.approx([4 * 6.0, 4 * 12.0, 9.0])
    assert values["step_ms"] == pytest.approx(81.0)
    assert values["samples_per_s"] == pytest.approx(12 / 0.081)
    assert len((next(tmp_path.rglob("metrics.csv"))).read_text().splitlines()) == 3  # the header, and entries at steps 3 and 6


def test_useful_and_computed_tokens_of_each_kind(tmp_path: Path) -> None:
    values = run(tmp_path, Throughput(every_n_steps=12))
    assert values["text_tokens_per_s"] == pytest.approx(21 / 0.027) and values["query_tokens_per_s"] == pytest.approx(4 / 0.027)
    assert (values["tokens_per_s"], values["computed_tokens_per_s"]) == pytest.approx((25 / 0.027, 40 / 0.027))
    assert (values["useful_text_share"], values["useful_query_share"], values["useful_share"]) == (7 / 12, 1.0, 25 / 40)


def test_micro_batches_are_summed_and_those_that_stand_in_are_of_no_use(tmp_path: Path) -> None:
    whole = run(tmp_path, Throughput(every_n_steps=3), accumulate_grad_batches=4)
    half = run(tmp_path, Throughput(every_n_steps=3), collate=stand_ins, accumulate_grad_batches=4)
    for name in ("samples_per_s", "images_per_s", "tokens_per_s", "useful_text_share"):
        assert half[name] == pytest.approx(whole[name] / 2, rel=0.15), name
    assert half["computed_tokens_per_s"] == pytest.approx(whole["computed_tokens_per_s"])
    assert whole["text_tokens_per_s"] == pytest.approx(84 / 0.081)


def test_what_the_method_does_not_say_is_not_logged(tmp_path: Path) -> None:
    silent = Slow()
    silent.counting = False
    assert not [name for name in run(tmp_path, Throughput(every_n_steps=3), silent) if "token" in name or "useful" in name]


@pytest.mark.processes
def test_rates_are_those_of_all_ranks_though_they_hold_unequal_batches_and_kinds() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rates_of_rank, args=(folder,), nprocs=2, start_method="fork")
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["samples_per_s"] == 5 and found[0]["images_per_s"] == 6
    assert found[0]["text_tokens_per_s"] == 3 + 4 and found[0]["useful_text_share"] == 7 / 11
    assert found[0]["query_tokens_per_s"] == 2 and found[0]["useful_share"] == 9 / 13


def rates_of_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    callback = Throughput()
    callback._samples, callback._images = (3, 2)[rank], (6, 0)[rank]
    text = TokenCount(torch.tensor(3 + rank), 5 + rank)
    callback._tokens = {"text": text, "query": TokenCount(2, 2)} if rank else {"text": text}
    torch.save(callback._rates(1.0), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
