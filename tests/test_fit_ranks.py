"""The real command on one and on two processes: the same scores, also where the ranks have different numbers of batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.shards.writing import write_shards
from umm_zoo.shapes import World, make_sample

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for split, tasks in (("train", {"captions": 5, "dialogues": 7}), ("val", {"questions": 3, "pairs": 2})):
        for task, count in tasks.items():
            samples = (make_sample(World(), 0, split, task, i).members(World()) for i in range(count))
            write_shards(samples, folder / split, task, samples_per_shard=2)
    return folder


def scores(shards: Path, runs: Path, devices: int) -> dict[str, float]:
    overrides = [f"vars.data={shards}", f"name=ranks{devices}", f"trainer.devices={devices}", "trainer.accelerator=cpu"]
    overrides += ["trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch_size=4", "data.val_batch_size=1"]
    overrides += [
        "training.optimizer.lr=0.0",
        "callbacks.validation.max_new_tokens=2",
        *(["trainer.strategy=ddp"] if devices > 1 else []),
    ]
    command = [sys.executable, "-m", "umm_zoo.fit", "experiments/llava/shapes.yaml", "--runs", str(runs), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((runs / f"ranks{devices}" / "metrics.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("val/")}


def test_two_processes_with_uneven_shards_score_as_one_does(shards: Path, tmp_path: Path) -> None:
    one, two = scores(shards, tmp_path, 1), scores(shards, tmp_path, 2)  # 5 validation rows: 3 batches on one rank, 2 on the other
    assert one.keys() == two.keys() and "val/perplexity" in one
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
