"""Time ``fit`` against a bare PyTorch loop: the same model, weights, batches and optimiser, as a ratio from one run.

    python tools/benchmark_fit.py EXPERIMENT.yaml [--steps 100] [--block 10] [key=value …]

``fit`` is the real path: the trainer that ``python -m umm_zoo.fit`` makes, with the experiment's own callbacks, loggers and
checkpointing, reading the experiment's data. The bare loop reads the same data through the same loader and does nothing but
forward, backward, clip, update and schedule. Both run without validation and without writing a checkpoint: the bare loop would have
to do the same work there.

The two take turns within one process, a block of steps each (one block spans a log period of the trainer), so that another load on
the machine meets both. Printed is the median over blocks of fit's time through the bare loop's, on the clock and, on a CPU, in
processor time, which other programs disturb less. The losses of the two must agree, which shows that they did the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning
import numpy as np
import torch
from lightning import Callback
from torch import Tensor

from umm_zoo.errors import UserError, user_errors
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import Experiment, load_experiment
from umm_zoo.training.record import RunRecord, seed_all
from umm_zoo.training.report import circumstances
from umm_zoo.training.run import make_trainer, quieten
from umm_zoo.training.run_folder import RunFolder
from umm_zoo.training.setup import build_experiment
from umm_zoo.training.signals import StopOnSignal


class BareLoop:
    """The shortest loop that trains the experiment's method on its data."""

    def __init__(self, experiment: Experiment, device: torch.device) -> None:
        lightning.seed_everything(experiment.seed, workers=True, verbose=False)
        built = build_experiment(experiment)
        self.method, self.device = built.method.to(device).train(), device
        built.data.setup("fit")
        self.batches = iter(built.data.train_dataloader())
        optimisation = self.method.configure_optimizers()
        scheduled = isinstance(optimisation, dict)
        self.optimizer = optimisation["optimizer"] if scheduled else optimisation
        self.schedule = optimisation["lr_scheduler"]["scheduler"] if scheduled else None
        self.mixed = experiment.trainer.get("precision", "32-true") == "bf16-mixed"
        self.clip = experiment.trainer.get("gradient_clip_val")
        self.trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]

    def step(self) -> Tensor:
        """One update; returns the loss before it."""
        batch = next(self.batches).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext():
            loss = self.method.training_losses(batch)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        return loss.detach()


class TakeTurns(Callback):
    """Lets the bare loop run a block after every block of the trainer, and times both.

    Args:
        experiment: what both train.
        warmup: steps of each that are not timed.
        block: steps of a block.
    """

    def __init__(self, experiment: Experiment, warmup: int, block: int) -> None:
        self.experiment, self.warmup, self.block = experiment, warmup, block
        self.fit: list[np.ndarray] = []  # (seconds, processor seconds) of each block
        self.bare: list[np.ndarray] = []
        self.fit_losses: list[Tensor] = []
        self.bare_losses: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the other side, from the same seed."""
        self.device = pl_module.device
        self.loop = BareLoop(self.experiment, self.device)
        seed_all(self.experiment.seed)
        self.began = self._now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
        """Hand over at the end of a block."""
        self.fit_losses.append(outputs["loss"].detach())
        timed = len(self.fit_losses) - self.warmup
        if timed < 0 or timed % self.block:
            return
        now = self._now()
        if timed:
            self.fit.append(now - self.began)
        for _turn in range(self.block if timed else self.warmup):
            self.bare_losses.append(self.loop.step())
        if timed:
            self.bare.append(self._now() - now)
        self.began = self._now()

    def _now(self) -> np.ndarray:
        """The clocks, when the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return np.array([time.perf_counter(), time.process_time()])


def prepare(file: str, overrides: Sequence[str], total: int) -> Experiment:
    """The experiment with ``total`` steps, one device, and nothing in them that a bare loop does not do.

    Raises:
        UserError: it is not valid, or asks for what the bare loop cannot do.
    """
    fixed: dict[str, int] = {"max_steps": total, "devices": 1, "val_check_interval": total, "limit_val_batches": 0}
    experiment = load_experiment(file, [*overrides, *(f"trainer.{key}={value}" for key, value in fixed.items())])
    check(experiment)
    if experiment.trainer.get("precision", "32-true") not in ("32-true", "bf16-mixed", 32):
        raise UserError(file, "trainer.precision: the bare loop does 32-true and bf16-mixed only")
    if experiment.trainer.get("accumulate_grad_batches", 1) != 1:
        raise UserError(file, "trainer.accumulate_grad_batches: the bare loop does 1 only; add trainer.accumulate_grad_batches=1")
    return experiment


def measure(experiment: Experiment, warmup: int, block: int) -> TakeTurns:
    """Run ``fit`` in a temporary run folder, taking turns with the bare loop."""
    lightning.seed_everything(experiment.seed, workers=True, verbose=False)
    built = build_experiment(experiment)
    turns = TakeTurns(experiment, warmup, block)
    with tempfile.TemporaryDirectory() as runs:
        folder = RunFolder.of(experiment, runs)
        more = [StopOnSignal(folder.checkpoints), turns]
        trainer = make_trainer(experiment, folder, built, RunRecord(experiment, folder), more)
        trainer.fit(built.method, datamodule=built.data)
    return turns


def report(turns: TakeTurns, experiment: Experiment, block: int, limit: float) -> int:
    """Print what was measured; 1 when the ratio is above the limit or the losses differ."""
    gap = float((torch.stack(turns.fit_losses) - torch.stack(turns.bare_losses)).abs().max())
    fit, bare = np.stack(turns.fit), np.stack(turns.bare)  # [blocks, 2]
    clock, processor = np.median(fit / bare, axis=0)
    fit_ms, bare_ms = (1000 * np.median(blocks[:, 0]) / block for blocks in (fit, bare))
    ratios = sorted(fit[:, 0] / bare[:, 0])
    where = circumstances()
    print(f"machine {where['machine']}, versions {where['versions']}, commit {where['commit']}")
    print(f"largest difference between the losses of the two: {gap:.2g}")
    print(
        f"{experiment.name}: fit {fit_ms:.2f} ms, bare loop {bare_ms:.2f} ms per step, medians of {len(ratios)} blocks of {block}"
    )
    print(f"ratio {clock:.3f} on the clock (blocks from {ratios[0]:.3f} to {ratios[-1]:.3f}), limit {limit}")
    if turns.device.type == "cpu":
        print(f"ratio {processor:.3f} in processor time")
    return int(clock > limit or gap > 1e-4)


def main() -> int:
    """The command; exit code 1 when the ratio is above the limit or the losses differ, 2 for a user error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each")
    parser.add_argument("--block", type=int, default=10, help="steps of each before the other has its turn")
    parser.add_argument("--warmup", type=int, default=5, help="steps of each before the first block")
    parser.add_argument("--limit", type=float, default=1.05, help="largest ratio that passes")
    arguments = parser.parse_intermixed_args()
    quieten()
    with user_errors() as outcome:
        blocks = max(1, arguments.steps // arguments.block)
        experiment = prepare(arguments.experiment, arguments.overrides, arguments.warmup + blocks * arguments.block)
        turns = measure(experiment, arguments.warmup, arguments.block)
        outcome.code = report(turns, experiment, arguments.block, arguments.limit)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
