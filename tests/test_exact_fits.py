"""The real command: weights, their averages and logged losses after six steps do not depend on how the steps were shared out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from exact_parts import exact_experiment
from nursery import Nursery
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.checkpoints.files import load_checkpoint, weights_of

pytestmark = pytest.mark.processes

SHARDED = "trainer.strategy={_target_: umm_zoo.training.sharding.FullyShardedStrategy}"
SOURCE = "{_target_: data_pipelines.shards.data.ShardSource, shards: train}"
STREAM = f"{{_target_: data_pipelines.shards.streaming.StreamData, train: {{all: {SOURCE}}}, batch_size: 8, image_size: 8}}"
Run = tuple[dict[str, Tensor], list[float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    exact_experiment(folder)
    return folder


def run(nursery: Nursery, folder: Path, name: str, ranks: int, *options: str) -> Run:
    argv = ["exact.yaml", f"name={name}", *options]
    code, said = nursery.run_ranks(folder, ranks, *argv) if ranks > 1 else nursery.run(folder, *argv)
    assert code == 0 and "counts alike" not in said, said
    with (folder / "runs" / name / "logs" / "metrics.csv").open() as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream)]
    checkpoint = load_checkpoint(folder / "runs" / name)
    averages, kind = weights_of(checkpoint)
    assert kind == "averaged"
    return checkpoint["state_dict"] | {f"average of {key}": value for key, value in averages.items()}, losses


def check(found: Run, expected: Run) -> None:
    assert found[1] == pytest.approx(expected[1], abs=1e-5) and len(expected[1]) == 6
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert_close(found[0][name], value, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def whole(nursery: Nursery, folder: Path) -> Run:
    return run(nursery, folder, "whole", 1)


SHARES = {
    "4 micro-batches": (1, "trainer.accumulate_grad_batches=4"),
    "8 micro-batches": (1, "trainer.accumulate_grad_batches=8"),
    "2 ranks": (2, "trainer.strategy=ddp"),
    "2 ranks of 4 micro-batches": (2, "trainer.strategy=ddp", "trainer.accumulate_grad_batches=4"),
    "2 ranks that share the weights out": (2, SHARDED, "trainer.accumulate_grad_batches=2"),
}


@pytest.mark.parametrize("name", SHARES)
def test_shards(name: str, whole: Run, nursery: Nursery, folder: Path) -> None:
    ranks, *options = SHARES[name]
    check(run(nursery, folder, name.replace(" ", "-"), ranks, *options), whole)


def test_a_stream(nursery: Nursery, folder: Path) -> None:
    one = run(nursery, folder, "stream1", 1, f"data={STREAM}")
    check(run(nursery, folder, "stream4", 1, f"data={STREAM}", "trainer.accumulate_grad_batches=4"), one)


def test_a_loader_of_ones_own_whose_last_step_of_an_epoch_is_shorter(nursery: Nursery, folder: Path) -> None:
    def data(size: int) -> str:
        return f"data={{_target_: exact_parts.OwnData, size: {size}}}"

    one = run(nursery, folder, "own1", 1, data(4))
    check(run(nursery, folder, "own4", 1, data(1), "trainer.accumulate_grad_batches=4"), one)


SPOILT = "data.train.all.shards=spoilt"


def test_a_micro_batch_of_bad_rows_alone_leaves_the_step_as_it_is(nursery: Nursery, folder: Path) -> None:
    one = run(nursery, folder, "spoilt1", 1, SPOILT)
    check(run(nursery, folder, "spoilt8", 1, SPOILT, "trainer.accumulate_grad_batches=8"), one)
    check(run(nursery, folder, "spoilt-ranks", 2, SPOILT, "trainer.accumulate_grad_batches=4", "trainer.strategy=ddp"), one)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_in_which_lightning_converts_each_batch_of_the_loader_take_its_steps(
    precision: str, nursery: Nursery, folder: Path
) -> None:
    run(nursery, folder, precision, 1, SPOILT, f"trainer.precision={precision}", "trainer.accumulate_grad_batches=4")
