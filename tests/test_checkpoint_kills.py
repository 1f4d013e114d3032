"""kill -9 at any moment: what is left is loadable, and the losses are those of the run that nothing interrupted."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from chain_parts import chain_experiment, losses
from nursery import Nursery

from data_pipelines.shards.writing import write_shards
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.checkpoints.folder import CheckpointFolder, damage

pytestmark = pytest.mark.processes

SAVING = "callbacks.checkpoint={_target_: umm_zoo.checkpoints.callback.LastCheckpoint, every_n_train_steps: 3}"
METRIC = "metrics.loss={_target_: toy_parts.MeanLoss}"
#: What the report of a run says of this run alone.
OWN = ("name", "seconds", "resumed_from", "history")
BUCKETS = "data.bucketing={_target_: data_pipelines.shards.bucketing.ByLength, edges: [1, 2]}"
AVERAGED = "callbacks.ema={_target_: umm_zoo.training.ema.EMA, decay: 0.9}"


class Trial:
    """One run, begun again and again."""

    def __init__(self, nursery: Nursery, folder: Path, steps: int, every: int = 7, *more: str) -> None:
        self.nursery, self.folder = nursery, folder
        file = chain_experiment(folder, noise=0.3)
        length = [f"trainer.max_steps={steps}", f"training.schedule.total_steps={steps}"]
        self.argv = [
            file,
            SAVING,
            AVERAGED,
            *length,
            METRIC,
            f"trainer.val_check_interval={every}",
            "trainer.log_every_n_steps=3",
            *more,
        ]
        self.checkpoints = CheckpointFolder(folder / "runs" / "chain" / "checkpoints")
        self.kills = 0

    def whole(self) -> None:
        code, said = self.nursery.run(self.folder, *self.argv, "name=whole")
        assert code == 0, said

    def go_on(self, kill_at: int | None = None, kill_after: float | None = None, kill_in: int | None = None) -> bool:
        """Begin or continue, and be killed at a step of writing, at a moment (see ``Nursery.start``) or after some seconds; whether
        it came to its end instead."""
        more = ["ckpt=last"] if self.checkpoints.newest() else []
        before = self.checkpoints.newest()
        pid = self.nursery.start(self.folder, *self.argv, *more, kill_at=kill_at, kill_in=kill_in)
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # a fast machine has ended it by then
                os.kill(pid, signal.SIGKILL)
        code = self.nursery.wait(pid)
        assert code in (0, -signal.SIGKILL), (self.folder / "log.txt").read_text()[-2000:]
        self.kills += code != 0
        newest = self.checkpoints.newest()
        assert newest is not None or before is None
        if newest is not None:  # and it is that of LATEST, for no other is tried first
            assert damage(newest) is None
            load_checkpoint(newest)
        return code == 0

    def compare(self) -> None:
        whole, parts = losses(self.folder / "whole.txt"), losses(self.folder / "chain.txt")
        assert parts == whole
        ends = [load_checkpoint(self.folder / "runs" / name) for name in ("whole", "chain")]
        averages = [next(value for key, value in end["callbacks"].items() if key.startswith("EMA"))["averages"] for end in ends]
        assert all((averages[0][key] == averages[1][key]).all() for key in averages[0])
        assert "damaged" not in (self.folder / "log.txt").read_text()
        self.compare_records()

    def compare_records(self) -> None:
        """Rows of the log, and the report but for its seconds."""
        rows, reports = zip(*(records(self.folder / "runs" / name) for name in ("whole", "chain")), strict=True)
        assert rows[1] == rows[0] and any(row["val/loss"] for row in rows[0])
        assert reports[1] == reports[0] and "val/loss" in reports[0]["metrics"]


def records(run: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Rows of the log and the report of a run, without what differs between two runs of one experiment."""
    report = json.loads((run / "metrics.json").read_text())
    with (run / "logs" / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream)), {key: value for key, value in report.items() if key not in OWN}


def test_three_kills_change_nothing(nursery: Nursery, tmp_path: Path) -> None:
    trial = Trial(nursery, tmp_path, steps=17)
    trial.whole()
    trial.go_on(kill_at=14)  # in the second checkpoint
    trial.go_on(kill_at=3)  # in the middle of a write
    trial.go_on(kill_after=0.3)
    while not trial.go_on():
        pass
    assert trial.kills >= 2
    trial.compare()
    assert len(list(trial.checkpoints.path.iterdir())) == 3  # LATEST and two checkpoints; what was half written is gone


def test_kills_change_nothing_of_an_order_by_buckets(nursery: Nursery, tmp_path: Path) -> None:
    trial = Trial(nursery, tmp_path, 17, 7, BUCKETS)
    rows = [{"task": "t", "kind": "k", "conversations": [{"role": "user", "text": "x" * (n * 7 % 5)}]} for n in range(23)]
    write_shards([{"__key__": f"k{n:03d}", "json": row} for n, row in enumerate(rows)], tmp_path / "train", "s", 4)
    trial.whole()
    trial.go_on(kill_at=14)
    trial.go_on(kill_at=3)
    while not trial.go_on():
        pass
    assert trial.kills == 2 and "│ 2 characters" in (tmp_path / "log.txt").read_text()
    trial.compare()


def test_kills_around_validations_lose_no_score(nursery: Nursery, tmp_path: Path) -> None:
    trial = Trial(nursery, tmp_path, 6, 3)
    trial.whole()
    for moment in (1, 14, 18, 4, 9, 16, 17, 3):
        assert not trial.go_on(kill_in=moment)
    while not trial.go_on():
        pass
    trial.compare_records()


@pytest.mark.long
def test_a_kill_at_every_moment_loses_no_score(nursery: Nursery, tmp_path: Path) -> None:
    trial = Trial(nursery, tmp_path, 6, 3)
    trial.whole()
    for moment in range(1, 1000):
        shutil.rmtree(tmp_path / "runs" / "chain", ignore_errors=True)
        finished = trial.go_on(kill_in=moment)
        while not trial.go_on():
            pass
        trial.compare_records()
        if finished:
            break
    print(f"{moment - 1} moments")
    assert moment > 40


@pytest.mark.long
def test_many_kills_change_nothing(nursery: Nursery, tmp_path: Path) -> None:
    trial = Trial(nursery, tmp_path, steps=600)
    trial.whole()
    chance = random.Random(time.time_ns())
    for number in range(1, 40):  # every step of writing, a checkpoint further on each time
        trial.go_on(kill_at=number)
    at_steps, longest, before = trial.kills, 0.2, trial.checkpoints.newest()
    while not trial.go_on(kill_after=chance.uniform(0.0, longest)):
        newest = trial.checkpoints.newest()
        longest *= 0.8 if newest != before else 1.25  # a run needs more seconds to get anywhere on a busy machine
        before = newest
    print(f"{at_steps} kills at steps of writing, {trial.kills - at_steps} at random moments")
    assert at_steps >= 30 and trial.kills - at_steps >= 5
    trial.compare()
