"""Resuming where things have changed: adapters, stages, other numbers of ranks, a cluster's warning, a full disk."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from chain_parts import Chain, chain_experiment, losses
from nursery import Nursery
from safetensors.torch import load_file

from tools.consolidate import main as consolidate
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.checkpoints.folder import CheckpointFolder, damage
from umm_zoo.method import Method

pytestmark = pytest.mark.processes

SHARDED = "trainer.strategy={_target_: umm_zoo.training.sharding.FullyShardedStrategy}"
AVERAGED = "callbacks.ema={_target_: umm_zoo.training.ema.EMA, decay: 0.9}"


def saving(every: int) -> str:
    node = {"_target_": "umm_zoo.checkpoints.callback.LastCheckpoint", "every_n_train_steps": every}
    return f"callbacks.checkpoint={json.dumps(node)}"


def test_adapters_of_a_second_stage_resume_exactly(nursery: Nursery, tmp_path: Path) -> None:
    base = chain_experiment(tmp_path)
    adapter = {"_target_": "umm_zoo.backbones.adapters.LoRA", "rank": 2, "alpha": 4.0}
    stage = {"base": base, "after": base, "method": {"noise": 0.2, "adapter": adapter}, "training": {"trained": ["adapter"]}}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(stage))
    argv = ["second.yaml", saving(2)]
    assert nursery.run(tmp_path, *argv, kill_at=3)[0] == -signal.SIGKILL  # in the first stage
    code, said = nursery.run(tmp_path, *argv, "name=whole")  # runs it again
    assert code == 0 and "which has not finished: " in said, said
    assert nursery.run(tmp_path, *argv, kill_at=40)[0] == -signal.SIGKILL  # in the second
    assert nursery.run(tmp_path, *argv, "ckpt=last")[0] == 0
    assert losses(tmp_path / "second.txt") == losses(tmp_path / "whole.txt")
    first, second = load_checkpoint(tmp_path / "runs" / "chain"), load_checkpoint(tmp_path / "runs" / "second")
    assert all(torch.equal(second["state_dict"][key], value) for key, value in first["state_dict"].items())
    assert {key.split(".")[0] for key in second["state_dict"].keys() - first["state_dict"].keys()} == {"adapter"}


def test_two_ranks_one_two_sharded_one(nursery: Nursery, tmp_path: Path) -> None:
    argv = [chain_experiment(tmp_path), AVERAGED, "trainer.val_check_interval=5"]
    assert nursery.run(tmp_path, *argv, "name=whole", "trainer.max_steps=13")[0] == 0
    for number, options in ((4, ["trainer.strategy=ddp"]), (7, []), (10, [SHARDED]), (11, [SHARDED]), (13, [])):
        more = [f"trainer.max_steps={number}", *options, *(["ckpt=last"] if number > 4 else [])]
        code, said = nursery.run_ranks(tmp_path, 2, *argv, *more) if options else nursery.run(tmp_path, *argv, *more)
        assert code == 0, said
        if number == 11:
            sharded = tmp_path / "runs" / "chain" / "checkpoints" / "step-00000011.ckpt"
            assert len(list(sharded.glob("*.safetensors"))) == 2
            _consolidated_equals(sharded, tmp_path)
    whole, parts = losses(tmp_path / "whole.txt"), losses(tmp_path / "chain.txt")
    in_parts, straight = ([float.fromhex(loss) for loss in losses.values()] for losses in (parts, whole))
    assert in_parts == pytest.approx(straight, abs=2e-6)
    for name, value in load_checkpoint(tmp_path / "runs" / "whole")["callbacks"].items():
        if name.startswith("EMA"):
            other = load_checkpoint(tmp_path / "runs" / "chain")["callbacks"][name]["averages"]
            for key, average in value["averages"].items():
                torch.testing.assert_close(other[key], average, atol=2e-6, rtol=1e-5)


def _consolidated_equals(sharded: Path, folder: Path) -> None:
    checkpoint = load_checkpoint(sharded)
    assert consolidate([str(sharded), "--out", str(folder / "weights.safetensors")]) == 0
    averaged = load_file(folder / "weights.safetensors")
    assert all(torch.equal(averaged[key], value) for key, value in checkpoint["callbacks"]["EMA"]["averages"].items())
    assert consolidate([str(sharded), "--raw-weights", "--out", str(folder / "weights.safetensors")]) == 0
    found, expected = load_file(folder / "weights.safetensors"), checkpoint["state_dict"]
    assert found.keys() == expected.keys() and len(found) == 16
    assert all(torch.equal(found[key], expected[key]) for key in found)
    method = Method.load(folder / "weights.safetensors", trust=["chain_parts"])
    assert isinstance(method, Chain) and torch.equal(method.head.weight, expected["head.weight"])
    file = max(sharded.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-3] + b"xyz")
    assert damage(sharded) == f"'{file.name}' is not what was written"
    assert CheckpointFolder(sharded.parent).latest() == sharded.with_name("step-00000010.ckpt")
    file.write_bytes(content)


def test_slurm_warns_requeues_and_goes_on_by_itself(nursery: Nursery, tmp_path: Path) -> None:
    argv = [chain_experiment(tmp_path, noise=0.3), "trainer.max_steps=300", saving(100000)]
    assert nursery.run(tmp_path, *argv, "name=whole")[0] == 0
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    pid = nursery.start(tmp_path, *argv, environment=slurm)
    deadline = time.monotonic() + 240
    while not (tmp_path / "chain.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(pid, signal.SIGUSR1)
    assert nursery.wait(pid) == 128 + signal.SIGUSR1
    said = (tmp_path / "log.txt").read_text()
    assert "stopped by SIGUSR1 at step" in said and "SLURM job 77 is requeued and goes on" in said
    assert (tmp_path / "bin" / "asked").read_text() == "requeue 77\n"
    code, said = nursery.run(tmp_path, *argv, "--again", environment={**slurm, "SLURM_RESTART_COUNT": "1"})  # the same command
    assert code == 0, said
    assert losses(tmp_path / "chain.txt") == losses(tmp_path / "whole.txt")
    assert json.loads((tmp_path / "runs" / "chain" / "metrics.json").read_text())["resumed_from"] is not None


def test_full_disk_is_one_line_and_keeps_the_last_checkpoint(nursery: Nursery, tmp_path: Path) -> None:
    argv = [chain_experiment(tmp_path, width=64), saving(3)]
    assert nursery.run(tmp_path, *argv, "name=whole")[0] == 0
    assert nursery.run(tmp_path, *argv, "trainer.max_steps=3")[0] == 0
    code, said = nursery.run(tmp_path, *argv, "ckpt=last", largest_file=60_000)
    assert code == 2 and "Traceback" not in said
    kept = "runs/chain/checkpoints/step-00000003.ckpt"
    lines = [line for line in said.splitlines() if "error" in line or "kept" in line]
    assert lines == [
        "error: chain.yaml: callbacks.checkpoint: runs/chain/checkpoints/step-00000006.ckpt could not be written: "
        "no room on the disk (File too large)",
        f"{kept} is kept; continue from it with ckpt=last",
    ]
    assert sorted(path.name for path in (tmp_path / "runs/chain/checkpoints").iterdir()) == ["LATEST", "step-00000003.ckpt"]
    assert nursery.run(tmp_path, *argv, "ckpt=last")[0] == 0
    assert losses(tmp_path / "chain.txt") == losses(tmp_path / "whole.txt")


def test_a_run_stopped_between_its_last_checkpoint_and_its_scores_finishes(nursery: Nursery, tmp_path: Path) -> None:
    watched = "callbacks.throughput={_target_: umm_zoo.callbacks.throughput.Throughput, every_n_steps: 1}"
    argv = [chain_experiment(tmp_path), watched, "trainer.max_steps=4"]
    code, said = nursery.run(tmp_path, *argv)
    assert code == 0, said
    scores = tmp_path / "runs" / "chain" / "metrics.json"
    costs = json.loads(scores.read_text())["costs"]
    scores.unlink()
    code, said = nursery.run(tmp_path, *argv, "ckpt=last")
    assert code == 0, said
    again = json.loads(scores.read_text())
    assert again["steps"] == 4 and again["costs"].keys() == costs.keys() >= {"seconds_per_step", "peak_memory_bytes"}
