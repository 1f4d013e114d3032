"""A reinforcement run that is killed while its rollouts are used again is, resumed, the run that nothing interrupted."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery
from rollout_parts import rollout_experiment

from umm_zoo.checkpoints.files import load_checkpoint

pytestmark = pytest.mark.processes


def entries(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if inner is None:
        yield place, value.tolist() if isinstance(value, torch.Tensor) else value
    for key, part in inner or ():
        yield from entries(part, f"{place}/{key}")


def checkpoint(folder: Path, name: str, step: int) -> dict[str, Any]:
    found = load_checkpoint(folder / "runs" / name / "checkpoints" / f"step-{step:08d}.ckpt")
    for own in ("experiment", "history"):  # with the callback that kills
        del found[own]
    return {place: value for place, value in entries(found) if "/seconds" not in place}


def die_at(step: int) -> str:
    return f"callbacks.die={json.dumps({'_target_': 'rollout_parts.DieAt', 'step': step})}"


@pytest.mark.parametrize(("method", "ranks"), [("Captioner", 1), ("Decoder", 1), ("Captioner", 2), ("Unified", 1), ("Dual", 1)])
def test_a_run_killed_between_updates_of_a_rollout_goes_on_as_if_nothing_had_been(
    method: str, ranks: int, nursery: Nursery, tmp_path: Path
) -> None:
    file = rollout_experiment(tmp_path, method, updates=3)

    def run(*options: str) -> tuple[list[int], str]:
        if ranks == 1:
            code, said = nursery.run(tmp_path, file, *options)
            return [code], said
        codes, texts = nursery.codes_of_ranks(tmp_path, ranks, file, "trainer.strategy=ddp", *options)
        return codes, "".join(texts)

    codes, said = run("name=whole")
    assert codes == [0] * ranks, said
    for kill in (2, 4):
        more = ["ckpt=last"] if kill > 2 else []
        assert run("name=parts", die_at(kill), *more)[0] == [-signal.SIGKILL] * ranks
    codes, said = run("name=parts", "ckpt=last")
    assert codes == [0] * ranks, said
    for step in (2, 3, 4, 5):
        whole, parts = (checkpoint(tmp_path, name, step) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert [key for key in whole if whole[key] != parts[key]] == []
        assert any("run_states" in key for key in whole) == (step % 3 > 0)
    assert losses(tmp_path / "runs" / "parts") == losses(tmp_path / "runs" / "whole")


@pytest.mark.parametrize("method", ["Captioner", "Decoder"])
def test_a_run_that_is_asked_to_stop_in_the_midst_of_a_step_ends_it_first(method: str, nursery: Nursery, tmp_path: Path) -> None:
    file = rollout_experiment(tmp_path, method, updates=4)
    assert nursery.run(tmp_path, file, "name=whole", "trainer.max_steps=3")[0] == 0
    asked = f"callbacks.die={json.dumps({'_target_': 'rollout_parts.DieAt', 'step': 1, 'signum': int(signal.SIGTERM)})}"
    assert nursery.run(tmp_path, file, "name=parts", "trainer.max_steps=3", asked)[0] == 128 + signal.SIGTERM
    assert nursery.run(tmp_path, file, "name=parts", "trainer.max_steps=3", "ckpt=last")[0] == 0
    whole, parts = (checkpoint(tmp_path, name, 3) for name in ("whole", "parts"))
    assert whole == parts


def losses(run: Path) -> list[dict[str, float]]:
    """Rows of the log, without the seconds."""
    with (run / "logs" / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if "seconds" not in key} for row in csv.DictReader(file)]


def test_rollouts_of_another_number_of_ranks_are_left_out_with_a_note(nursery: Nursery, tmp_path: Path) -> None:
    file = rollout_experiment(tmp_path, "Captioner", updates=5)
    assert nursery.run(tmp_path, file, "trainer.max_steps=2")[0] == 0
    code, said = nursery.run_ranks(tmp_path, 2, file, "trainer.max_steps=3", "trainer.strategy=ddp", "ckpt=last")
    assert code == 0 and "run_state of 1 ranks is left out: there are 2 now" in said, said
    code, said = nursery.run_ranks(tmp_path, 2, file, "trainer.max_steps=4", "trainer.strategy=ddp", "ckpt=last")
    assert code == 0 and "left out" not in said
    states = load_checkpoint(tmp_path / "runs" / "stage")["run_states"]
    assert [state["steps_begun"] for state in states] == [2, 2]
    assert states[0]["window"][0]["batch"]["keys"] != states[1]["window"][0]["batch"]["keys"]


@pytest.mark.parametrize("method", ["Captioner", "Decoder", "Unified", "Dual"])
def test_a_rank_without_a_row_to_score_keeps_nobody_waiting(method: str, nursery: Nursery, tmp_path: Path) -> None:
    file = rollout_experiment(tmp_path, method, flat_on=1)
    code, said = nursery.run_ranks(tmp_path, 2, file, "trainer.max_steps=2", "trainer.strategy=ddp")
    assert code == 0, said
    rows = losses(tmp_path / "runs" / "stage")
    assert [row["train/zero_advantage"] for row in rows] == [0.5] * 2 and all(row["train/reward"] != 0 for row in rows)


def test_weights_that_are_shared_out_are_refused_in_one_line(nursery: Nursery, tmp_path: Path) -> None:
    file = rollout_experiment(tmp_path, "Decoder")
    sharded = "trainer.strategy={_target_: umm_zoo.training.sharding.FullyShardedStrategy}"
    code, said = nursery.run_ranks(tmp_path, 2, file, sharded)
    assert code == 2 and "error: stage.yaml: trainer.strategy: found FullyShardedStrategy with Decoder, expected ddp" in said


def test_rollouts_of_another_number_of_micro_batches_are_left_out_with_a_note(nursery: Nursery, tmp_path: Path) -> None:
    file = rollout_experiment(tmp_path, "Decoder", updates=5)
    assert nursery.run(tmp_path, file, "trainer.max_steps=2")[0] == 0
    code, said = nursery.run(tmp_path, file, "trainer.max_steps=3", "trainer.accumulate_grad_batches=4", "ckpt=last")
    assert code == 0 and "the checkpoint's rollouts are left out: they are of 2 micro-batches, 4 now" in said, said
    state = load_checkpoint(tmp_path / "runs" / "stage")["run_states"][0]
    assert state["steps_begun"] == 1 and len(state["window"]) == 4
