"""What loggers are told beside losses and scores: the experiment, learning rates, the norm of the gradient, sample grids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Logged(Callback):
    """Callback that tells the loggers the resolved experiment, and at log steps learning rates and the norm of the gradient.

    ``optimiser/lr`` (``optimiser/lr/GROUP`` where a step has several rates) and ``optimiser/grad_norm``, over all trained
    parameters, before it is clipped. Every run has it, under the key ``logged`` of its callbacks.

    Args:
        experiment: the resolved one, plain; it goes to the loggers of the experiment, for the others have the run folder.
        loggers: those of the experiment.
    """

    def __init__(self, experiment: Mapping[str, Any], loggers: Mapping[str, Logger]) -> None:
        self.experiment, self.loggers = experiment, loggers

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the experiment."""
        for logger in self.loggers.values():
            logger.log_hyperparams(dict(self.experiment))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log rates and norm, at the steps at which losses are logged."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (trainer.global_step + 1) % every:
            return
        values: dict[str, Any] = {f"optimiser/lr{name}": rate for name, rate in rates_of(optimizer).items()}
        values["optimiser/grad_norm"] = gradient_norm(optimizer)
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)


def rates_of(optimizer: Optimizer) -> dict[str, float]:
    """Learning rates: one, without a name, where all groups have the same; else ``/NAME`` or ``/NUMBER`` of each group."""
    rates = {f"/{group.get('name', number)}": float(group["lr"]) for number, group in enumerate(optimizer.param_groups)}
    return rates if len(set(rates.values())) > 1 else {"": next(iter(rates.values()))}


def gradient_norm(optimizer: Optimizer) -> torch.Tensor:
    """Euclidean norm of all gradients; of shards, over all ranks."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@runtime_checkable
class TakesImages(Protocol):
    """Logger with a function for images, as W&B's has."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Log images under a name."""


def log_image(logger: Logger, file: Path, step: int) -> None:
    """Send an image file, under the name of its folder, to a logger that takes images; others are left alone."""
    name = file.parent.name
    if isinstance(logger, TensorBoardLogger):
        with Image.open(file) as image:
            logger.experiment.add_image(name, np.array(image.convert("RGB")), step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(file), name)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(str(file), name=name, step=step)
    elif isinstance(logger, TakesImages):
        logger.log_image(key=name, images=[str(file)], step=step)
