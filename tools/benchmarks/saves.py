"""How long a checkpoint keeps training waiting, by the clock: written from a copy while training goes on, or waited for.

``background`` is what ``LastCheckpoint`` does; ``waited`` is the same until the checkpoint stands on the disk. One rank, or two on
this machine whose weights and moments are shared out. ``size`` is of the trained weights in MB (float32); with the moments three
times as much is written. ``memory`` is what a save takes beside what training holds, on rank 0. The first save of a run is not
counted, for it takes memory from the system that later ones find.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.benchmarks import base
from tools.benchmarks.base import Numbers, Options
from umm_zoo.batch import Batch
from umm_zoo.checkpoints.callback import LastCheckpoint
from umm_zoo.method import Method
from umm_zoo.outputs import Outputs

UNIT, OWN = "checkpoint", ("background", "waited")
SETTINGS = {"one rank": 1, "two ranks, sharded": 2}
SIZES: dict[str, Any] = {"size": 300, "saves": 5}
SMALLEST: dict[str, Any] = {"size": 1, "saves": 2}
WIDTH = 512


def cases(options: Options) -> list[tuple[str, str]]:
    """Ranks, and whether the writing is waited for."""
    return [(setting, arm) for setting in SETTINGS for arm in OWN]


def missing(options: Options, arm: str) -> str:
    """Nothing is needed."""
    return ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """A save of a run of its own, in processes of its own."""
    folder, count = Path(options.folder) / f"{setting}-{arm}-{os.getpid()}", SETTINGS[setting]
    prepare(folder, options, count, arm)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0", "WORLD_SIZE": str(count)}
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(folder, {**shared, "LOCAL_RANK": str(rank)})) for rank in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError((folder / "said.txt").read_text(encoding="utf-8").strip().splitlines()[-1])
    found = json.loads((folder / "took.json").read_text(encoding="utf-8"))
    return {name: statistics.median(values) for name, values in found.items()}


def prepare(folder: Path, options: Options, count: int, arm: str) -> None:
    """Rows, and the experiment."""
    import yaml

    from data_pipelines.shards.writing import write_shards

    rows = [{"__key__": f"{number:03d}", "json": {"conversations": []}} for number in range(8)]
    write_shards(rows, folder / "rows", "rows", 4)
    strategy = {"_target_": "umm_zoo.training.sharding.FullyShardedStrategy"} if count > 1 else "auto"
    source = {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "rows"}
    tree: dict[str, Any] = {
        "name": "saves",
        "method": {"_target_": f"{__name__}.Wide", "layers": max(1, round(options.size * 1e6 / 4 / WIDTH**2))},
        "training": {"trained": ["layers"], "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 1e-3}},
        "data": {"_target_": "data_pipelines.shards.data.ShardData", "train": {"rows": source}, "batch_size": 2, "image_size": 8},
        "callbacks": {"checkpoint": {"_target_": f"{__name__}.Timed", "waits": arm == "waited", "file": "took.json"}},
        "trainer": {"max_steps": options.saves, "devices": count, "strategy": strategy, "limit_val_batches": 0, "logger": False},
    }
    tree["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    (folder / "saves.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def run(folder: Path, environment: dict[str, str]) -> None:
    """One rank."""
    os.chdir(folder)
    os.environ |= environment
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    from umm_zoo.fit import main

    os._exit(main(["saves.yaml"]))


class Wide(Method):
    """Many layers, little work."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def parts(self) -> dict[str, nn.Module]:
        """What can be trained."""
        return {"layers": self.layers}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Of a row of ones."""
        x = torch.ones(1, WIDTH, device=self.device)
        for layer in self.layers:
            x = x + layer(x)
        return {"loss": x.square().mean()}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:  # type: ignore[override]
        """Never called."""
        return Outputs()


class Timed(LastCheckpoint):
    """A checkpoint at every step, and a file of the seconds for which each has kept training waiting."""

    def __init__(self, waits: bool, file: str) -> None:
        super().__init__(1)
        self.waits, self.file, self.took = waits, Path(file), dict[str, list[float]]()

    def _save_if_new(self, trainer: Any) -> None:
        if trainer.global_step == self._saved_step:
            return
        trainer.strategy.barrier()
        before, began = base.memory_from_here("cpu"), time.perf_counter()
        super()._save_if_new(trainer)
        if self.waits:
            stand(trainer)
        seconds = time.perf_counter() - began
        stand(trainer)
        if trainer.global_step > 1 and trainer.is_global_zero:
            for name, value in (("seconds", seconds), ("memory", base.held("cpu") - before)):
                self.took.setdefault(name, []).append(value)
            self.file.write_text(json.dumps(self.took), encoding="utf-8")


def stand(trainer: Any) -> None:
    """Wait until the checkpoint is on the disk; packages before there was a thread have waited already."""
    try:
        from umm_zoo.checkpoints.saving import finish
    except ImportError:
        return
    finish(trainer)
