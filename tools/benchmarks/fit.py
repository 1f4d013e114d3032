"""``fit`` against a bare PyTorch loop: the same model, weights, batches and optimiser.

``fit`` is the real path: the trainer that ``python -m umm_zoo.fit`` makes, with the experiment's own callbacks, loggers and
checkpointing, reading the experiment's data. The bare loop reads the same data through the same loader and does nothing but
forward, backward, clip, update and schedule. Both run without validation and without writing a checkpoint: the bare loop would have
to do the same work there. ``loss`` is the mean over the timed steps; the two must agree, which shows that they did the same.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tools.benchmarks import base
from tools.benchmarks.base import Numbers, Options
from umm_zoo.errors import UserError

UNIT, OWN = "step", ("fit", "bare")
#: ``overrides`` are the experiment's, with commas between them.
SIZES: dict[str, Any] = {"experiment": "experiments/llava/shapes.yaml", "overrides": "", "steps": 50, "warmup": 5}
SMALLEST: dict[str, Any] = {"steps": 2, "warmup": 1}


def cases(options: Options) -> list[tuple[str, str]]:
    """The experiment."""
    return [(options.experiment, arm) for arm in ("fit", "bare")]


def missing(options: Options, arm: str) -> str:
    """Nothing is needed but the experiment's data."""
    return ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """A step of one of the two, in this process."""
    import lightning

    from umm_zoo.training.run import quieten

    quieten()
    total = options.warmup + options.steps
    experiment = prepare(options.experiment, [word for word in options.overrides.split(",") if word], total)
    lightning.seed_everything(experiment.seed, workers=True, verbose=False)
    moments, losses = (fitted if arm == "fit" else looped)(experiment, total, options.device)
    took = [end - begin for begin, end in zip(moments[options.warmup :], moments[options.warmup + 1 :], strict=False)]
    return {"seconds": statistics.fmean(took), "loss": float(torch.stack(losses[options.warmup :]).mean())}


def prepare(file: str, overrides: Sequence[str], total: int) -> Any:
    """The experiment with ``total`` steps, one device, and nothing in them that a bare loop does not do.

    Raises:
        UserError: it is not valid, or asks for what the bare loop cannot do.
    """
    from umm_zoo.experiment.check import check
    from umm_zoo.experiment.file import load_experiment

    fixed: dict[str, int] = {"max_steps": total, "devices": 1, "val_check_interval": total, "limit_val_batches": 0}
    experiment = load_experiment(file, [*overrides, *(f"trainer.{key}={value}" for key, value in fixed.items())])
    check(experiment)
    if experiment.trainer.get("precision", "32-true") not in ("32-true", "bf16-mixed", 32):
        raise UserError(file, "trainer.precision: the bare loop does 32-true and bf16-mixed only")
    if experiment.trainer.get("accumulate_grad_batches", 1) != 1:
        raise UserError(file, "trainer.accumulate_grad_batches: the bare loop does 1 only; add trainer.accumulate_grad_batches=1")
    return experiment


def fitted(experiment: Any, total: int, device: str) -> tuple[list[float], list[Tensor]]:
    """The times between steps, and the losses, of the trainer in a temporary run folder."""
    from lightning import Callback

    from umm_zoo.training.record import RunRecord
    from umm_zoo.training.run import make_trainer
    from umm_zoo.training.run_folder import RunFolder
    from umm_zoo.training.setup import build_experiment
    from umm_zoo.training.signals import StopOnSignal

    moments, losses = list[float](), list[Tensor]()

    class Watch(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            moments.append(base.processor_time(device))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            losses.append(outputs["loss"].detach())
            moments.append(base.processor_time(device))

    built = build_experiment(experiment)
    with tempfile.TemporaryDirectory() as runs:
        folder = RunFolder.of(experiment, runs)
        more = [StopOnSignal(folder.checkpoints), Watch()]
        trainer = make_trainer(experiment, folder, built, RunRecord(experiment, folder), more)
        trainer.fit(built.method, datamodule=built.data)
    return moments, losses


def looped(experiment: Any, total: int, device: str) -> tuple[list[float], list[Tensor]]:
    """The same of the shortest loop that trains the experiment's method on its data."""
    from umm_zoo.training.record import seed_all
    from umm_zoo.training.setup import build_experiment

    built = build_experiment(experiment)
    method = built.method.to(device).train()
    built.data.setup("fit")
    batches = iter(built.data.train_dataloader())
    optimisation: Any = method.configure_optimizers()
    scheduled = isinstance(optimisation, dict)
    optimizer = optimisation["optimizer"] if scheduled else optimisation
    schedule = optimisation["lr_scheduler"]["scheduler"] if scheduled else None
    mixed, clip = experiment.trainer.get("precision", "32-true") == "bf16-mixed", experiment.trainer.get("gradient_clip_val")
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    seed_all(experiment.seed)
    moments, losses = [base.processor_time(device)], list[Tensor]()
    for _ in range(total):
        batch = next(batches).to(device)
        with torch.autocast(device.partition(":")[0], torch.bfloat16) if mixed else nullcontext():
            loss = method.training_losses(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.detach())
        moments.append(base.processor_time(device))
    return moments, losses
