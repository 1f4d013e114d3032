"""Averages the trained weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from umm_zoo.callbacks.steps import StepCallback
from umm_zoo.training.optimization import Fraction
from umm_zoo.training.sharding import gather_weights, placed


class EMA(StepCallback):
    """Keeps an exponential moving average of every trained parameter, and validates with it.

    The first update sets the average to the weights; update t > 1 moves it by ``1 - min(decay, t / (9 + t))`` towards them, as
    diffusers' ``EMAModel`` does (our choice): it follows quickly at first. Validation, and so every metric and sample grid, sees
    the averaged weights; training never does. The averages, in float32, are saved in the checkpoint as this callback's state, so a
    resumed run continues exactly. Whatever uses the run afterwards takes the averages (``umm_zoo.checkpoints.files.weights_of``):
    evaluate, generate, a stage ``after`` it, ``Method.load``, exports. The checkpoint's own weights are the raw ones; a resumed run
    goes on from them.

    Weights that ``FullyShardedStrategy`` shares out have averages shared out alike; those of torch's first FSDP are not supported.

    Args:
        decay: of the average.

    Raises:
        ValueError: decay is not in [0, 1), or a checkpoint's averages are of other parameters than those trained.
    """

    def __init__(self, decay: Fraction = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA.decay: found {decay}, expected a number in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.averages: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}  # the weights in training, while the averages stand in the model

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights, or from the loaded averages."""
        trained = _trained(pl_module)
        if self.averages and self.averages.keys() != trained.keys():
            odd = sorted(self.averages.keys() ^ trained.keys())
            raise ValueError(f"EMA: the checkpoint's averages and the trained parameters differ in {len(odd)}, such as '{odd[0]}'")
        start = self.averages or trained
        copies = {name: start[name].detach().to(own.device, torch.float32, copy=True) for name, own in trained.items()}
        self.averages = {name: placed(copy, trained[name]) for name, copy in copies.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Again: a strategy that shares weights out loads checkpoints later than the others."""
        self.on_fit_start(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move towards the weights."""
        self.updates += 1
        weight = 1 - min(self.decay, self.updates / (9 + self.updates)) if self.updates > 1 else 1.0
        trained = _trained(pl_module)
        with torch.no_grad():
            current = [trained[name].detach().float() for name in self.averages]
            torch._foreach_lerp_(list(self.averages.values()), current, weight)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages in."""
        if self.averages and not self._raw:
            self._raw = {name: parameter.detach().clone() for name, parameter in _trained(pl_module).items()}
            self.copy_to(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the raw weights back."""
        if self._raw:
            gather_weights(pl_module, False)
            _copy(self._raw, pl_module)
            self._raw = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint written during a validation (a run stopped there) holds the raw weights all the same."""
        checkpoint["state_dict"].update(self._raw)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Whoever saves after a failed validation saves the raw weights."""
        self.on_validation_end(trainer, pl_module)

    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into the parameters of the same names."""
        _copy(self.averages, module)

    def state_dict(self) -> dict[str, Any]:
        """Contents of the checkpoint."""
        return {"updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        self.updates, self.averages = state_dict["updates"], dict(state_dict["averages"])


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _copy(values: dict[str, Tensor], module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(placed(value, parameters[name]))
