"""Sharded checkpoints written while training goes on: the file that torch would write, all ranks or none, and kills of any rank."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from chain_parts import chain_experiment, losses
from nursery import Nursery
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from umm_zoo.checkpoints import sharded
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.checkpoints.folder import CheckpointFolder, damage

SAVING = "callbacks.checkpoint={_target_: umm_zoo.checkpoints.callback.LastCheckpoint, every_n_train_steps: 3}"
AVERAGED = "callbacks.ema={_target_: umm_zoo.training.ema.EMA, decay: 0.9}"
SHARDED = "trainer.strategy={_target_: umm_zoo.training.sharding.FullyShardedStrategy}"


def test_the_file_of_a_rank_is_what_torch_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "_PIECE", 64)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def slices() -> dict[str, DTensor]:
        torch.manual_seed(0)
        whole = {"a": torch.randn(5, 7), "of": torch.randn(3, 2).bfloat16(), "few": torch.randn(0, 4), "b": torch.arange(9)}
        whole |= {"turned": torch.randn(6, 11).t(), "flags": torch.rand(13) > 0.5}
        return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}

    live = slices()
    write = sharded.copied({"state_dict": live}, tmp_path / "ours", dist.group.WORLD)  # type: ignore[arg-type]
    for tensor in live.values():
        tensor.zero_()  # training goes on in place
    write(lambda: None)
    theirs = {f"['state_dict']['{name}']": tensor for name, tensor in slices().items()}
    dcp.save(theirs, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True))
    dist.destroy_process_group()
    (name,) = (file.name for file in (tmp_path / "theirs").iterdir())
    files = [safe_open(str(tmp_path / folder / name), framework="pt") for folder in ("ours", "theirs")]
    said = [{**file.metadata(), "DCP_SHARDING_INFO": json.loads(file.metadata()["DCP_SHARDING_INFO"])} for file in files]
    assert said[0] == said[1] and files[0].offset_keys() == files[1].offset_keys()
    for key, tensor in theirs.items():
        assert torch.equal(files[0].get_tensor(key), tensor.to_local()) and files[0].get_tensor(key).dtype == tensor.dtype
    sizes = [(tmp_path / folder / name).stat().st_size for folder in ("ours", "theirs")]
    assert sizes[0] == sizes[1] and damage(tmp_path / "ours") is None


@pytest.mark.processes
def test_training_goes_on_and_a_rank_that_cannot_write_ends_all_in_one_line(nursery: Nursery, tmp_path: Path) -> None:
    argv = [chain_experiment(tmp_path), SHARDED, SAVING, "trainer.max_steps=9"]
    disk = "callbacks.disk={_target_: disk_parts.Disk, opens: 5, full: 6}"
    codes, said = nursery.codes_of_ranks(tmp_path, 2, *argv, disk)
    assert codes == [2, 2] and "".join(said).count("error: ") == 1, said
    assert "step-00000006.ckpt could not be written: no room on the disk" in said[0]
    checkpoints = CheckpointFolder(tmp_path / "runs" / "chain" / "checkpoints")
    assert sorted(path.name for path in checkpoints.path.iterdir()) == ["LATEST", "step-00000003.ckpt"]
    assert load_checkpoint(tmp_path / "runs" / "chain")["global_step"] == 3


class Ranks:
    """One run of two ranks, begun again and again."""

    def __init__(self, nursery: Nursery, folder: Path, steps: int) -> None:
        self.nursery, self.folder, self.kills = nursery, folder, 0
        length = [f"trainer.max_steps={steps}", f"training.schedule.total_steps={steps}"]
        self.argv = [chain_experiment(folder, noise=0.3), SHARDED, SAVING, AVERAGED, *length]
        self.checkpoints = CheckpointFolder(folder / "runs" / "chain" / "checkpoints")
        codes, said = nursery.codes_of_ranks(folder, 2, *self.argv, "name=whole")
        assert codes == [0, 0], said

    def go_on(self, kill_at: Mapping[int, int] | None = None, kill_after: float | None = None) -> bool:
        """Begin or continue, and be killed: one rank at a step of writing and then the other, as a cluster does, or both after some
        seconds; whether it came to its end instead."""
        more = ["ckpt=last"] if self.checkpoints.newest() else []
        pids = dict(enumerate(self.nursery.start_ranks(self.folder, 2, *self.argv, *more, kill_at=kill_at)))
        codes = [self.nursery.wait(pids.pop(rank)) for rank in kill_at or {}]
        time.sleep(kill_after or 0)
        if kill_after is not None or any(codes):
            for pid in pids.values():
                with suppress(ProcessLookupError):  # it has ended by then
                    os.kill(pid, signal.SIGKILL)
        codes += [self.nursery.wait(pid) for pid in pids.values()]
        assert {*codes} <= {0, -signal.SIGKILL}, (self.folder / "log0.txt").read_text()[-2000:]
        self.kills += any(codes)
        if (newest := self.checkpoints.newest()) is not None:  # that of LATEST, for no other is tried first
            assert damage(newest) is None
            load_checkpoint(newest)
        return not any(codes)

    def compare(self) -> None:
        assert losses(self.folder / "chain.txt") == losses(self.folder / "whole.txt")
        one, other = (load_checkpoint(self.folder / "runs" / name) for name in ("whole", "chain"))
        assert all(torch.equal(other["state_dict"][key], value) for key, value in one["state_dict"].items())
        assert len(list(self.checkpoints.path.iterdir())) == 3  # LATEST and two checkpoints; what was half written is gone


@pytest.mark.processes
def test_kills_of_either_rank_change_nothing(nursery: Nursery, tmp_path: Path) -> None:
    ranks = Ranks(nursery, tmp_path, 8)
    assert not ranks.go_on({0: 11}) and not ranks.go_on({1: 3})
    assert ranks.go_on() and ranks.kills == 2
    ranks.compare()


@pytest.mark.processes
@pytest.mark.long
def test_many_kills_of_ranks_change_nothing(nursery: Nursery, tmp_path: Path) -> None:
    ranks = Ranks(nursery, tmp_path, 200)
    chance = random.Random(time.time_ns())
    for number in range(1, 31):  # every step of writing, a checkpoint further on each time
        ranks.go_on({number % 2: number})
    at_steps, longest, before = ranks.kills, 0.5, ranks.checkpoints.newest()
    while not ranks.go_on(kill_after=chance.uniform(0.0, longest)):
        newest = ranks.checkpoints.newest()
        longest *= 0.8 if newest != before else 1.25  # a run needs more seconds to get anywhere on a busy machine
        before = newest
    print(f"{at_steps} kills at steps of writing, {ranks.kills - at_steps} at random moments")
    assert at_steps >= 25 and ranks.kills - at_steps >= 5
    ranks.compare()
