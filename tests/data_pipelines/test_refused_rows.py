"""A row that the method cannot use, too long for instance, is left out and named as a damaged sample is."""

import json
from pathlib import Path

import pytest
import torch
from test_shards import Recorder, data_of, fit, write_world
from torch import nn

from data_pipelines.shards.data import ShardSource
from data_pipelines.shards.streaming import StreamData
from umm_zoo.batch import stacked
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.outputs import Outputs


class Choosy(Method):
    """Takes no row whose answer is a multiple of ``every``, and records what it gets; on several ranks in a file each."""

    def __init__(self, every: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.every, self.seen, self.validated = every, [], []

    def parts(self):
        return {"layer": self.layer}

    def check_rows(self, batch, scoring):
        for row, answer in enumerate(batch.answers()):
            if int(answer) % self.every == 0:
                assert batch.images[0].device.type == "meta" and batch.images[0].shape == (3, 8, 8)
                raise UserError("", "3,000 tokens", "at most 2,048", row=row)

    def training_losses(self, batch):
        self.seen += batch.keys
        for row, answer in enumerate(batch.answers()):  # images stayed with their rows
            torch.testing.assert_close(batch.images_of(row)[0][0, 0, 0].item(), int(answer) / 127.5 - 1)
        return {"loss": self.layer.weight.sum() * stacked(batch.images).mean()}

    def validation_step(self, batch, batch_idx):
        self.validated += batch.keys
        return Outputs()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_fit_end(self):
        path = Path(self.trainer.default_root_dir, f"rank{self.trainer.global_rank}.json")
        path.write_text(json.dumps(self.seen))


REFUSED = {f"s{n:04d}" for n in range(0, 25, 4)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), [5, 9, 1, 7, 3])


def ledger(folder):
    return json.loads((folder / "data.json").read_text())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
def test_refused_rows_are_left_out_named_and_counted(world, tmp_path, workers):
    taken = fit(data_of(world, batch_size=25, num_workers=workers), tmp_path, 1, model=Choosy())
    assert {key.split(":")[1] for key in taken.seen} == {f"s{n:04d}" for n in range(25)} - REFUSED
    source = ledger(tmp_path)["train"]["a"]
    assert {skip["key"] for skip in source["skips"]} == REFUSED and (source["read"], source["skipped"]) == (18, 7)
    assert {skip["reason"] for skip in source["skips"]} == {"found 3,000 tokens, expected at most 2,048"}


@pytest.mark.processes
def test_two_ranks_and_a_resume_see_the_rows_of_one_straight_run(world, tmp_path):
    straight = fit(data_of(world), tmp_path / "straight", 9, model=Choosy()).seen
    first = fit(data_of(world), tmp_path / "run", 4, model=Choosy()).seen
    ranks = {"devices": 2, "strategy": "ddp_fork", "num_sanity_val_steps": 0}
    fit(data_of(world), tmp_path / "run", 9, tmp_path / "run/at-step=4.ckpt", model=Choosy(), **ranks)
    seen = [json.loads((tmp_path / f"run/rank{rank}.json").read_text()) for rank in range(2)]
    assert sorted(first + seen[0] + seen[1]) == sorted(straight)
    assert ledger(tmp_path / "run")["train"] == ledger(tmp_path / "straight")["train"]


def test_accumulated_micro_batches_of_refused_rows_alone_repeat_others_and_say_so(world, tmp_path):
    taken = fit(data_of(world, batch_size=2, window=0), tmp_path, 5, accumulate=2, model=Choosy(2))
    assert [key.split(":")[1] for key in taken.seen] == [f"s{n:04d}" for n in (1, 1, 3, 3, 5, 5, 7, 7, 9, 9)]
    source = ledger(tmp_path)["train"]["a"]
    assert source["substituted"] == 5 and source["skips"][1]["substitute"] == "a/part-000.tar:s0003"


def test_too_many_refused_rows_stop_the_run_with_their_list(world, tmp_path):
    with pytest.raises(UserError, match=r"max_skips: found 4 bad samples, expected 3 .*s00.*3,000 tokens"):
        fit(data_of(world, batch_size=25, max_skips=3), tmp_path, 1, model=Choosy())
    with pytest.raises(UserError, match=r"samples in a row that the method cannot use.*3,000 tokens"):
        fit(data_of(world, batch_size=25), tmp_path, 1, model=Choosy(1))


def test_rows_of_a_validation_are_refused_too(world, tmp_path):
    data = data_of(world, val={"v": ShardSource(str(world))}, val_batch_size=5, batch_size=4)
    taken = fit(data, tmp_path, 1, model=Choosy(), val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    assert {key.split(":")[1] for key in taken.validated} == {f"s{n:04d}" for n in range(25)} - REFUSED
    assert ledger(tmp_path)["val"]["v"]["skipped"] == 7


def test_streamed_rows_are_refused_too(world, tmp_path):
    data = StreamData({"a": ShardSource(str(world))}, batch_size=25, image_size=8)
    taken = fit(data, tmp_path, 1, model=Choosy())
    assert {key.split(":")[1] for key in taken.seen} == {f"s{n:04d}" for n in range(25)} - REFUSED
    assert {skip.key for skip in data.ledger.skips} == REFUSED


def test_a_plain_module_takes_every_row(world, tmp_path):
    assert len(fit(data_of(world, batch_size=25), tmp_path, 1, model=Recorder()).seen) == 25
