"""The smallest method and data that ``fit`` can train: two linear layers on noise around the length of a key."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torchmetrics
import yaml
from lightning import Callback, LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.outputs import Outputs
from umm_zoo.training.optimization import OptimizerFactory, Schedule


class Body(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout, self.out_dim = nn.Linear(in_dim, out_dim), nn.Dropout(dropout), out_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x))


class Head(nn.Module):
    def __init__(self, in_dim: int, kind: Literal["plain", "squared"] = "plain", scales: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.linear, self.in_dim, self.kind, self.scales = nn.Linear(in_dim, 1), in_dim, kind, scales

    @classmethod
    def narrow(cls, in_dim: int) -> Head:
        return cls(in_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def make_head(in_dim: int) -> Head:
    return Head(in_dim)


class Toy(Method):
    def __init__(self, body: Body, head: Head, bias: float = 0.0) -> None:
        super().__init__()
        if body.out_dim != head.in_dim:
            raise ValueError(f"body.out_dim is {body.out_dim} and head.in_dim is {head.in_dim}, they must be equal")
        self.body, self.head, self.bias = body, head, bias

    def parts(self) -> dict[str, nn.Module]:
        return {"body": self.body, "head": self.head}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        x = torch.tensor([[float(len(key))] * self.body.linear.in_features for key in batch.keys], device=self.device)
        return {"loss": (self.head(self.body(x + 0.1 * torch.randn_like(x))) - 1 + self.bias).square().mean()}

    @property
    def makes(self) -> tuple[str, ...]:
        return ("loss",)

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        return Outputs(self.training_losses(batch))


class OneWeight(Method):
    """A single layer, which is its loss; what a test is about, it overrides."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def parts(self) -> dict[str, nn.Module]:
        return {"layer": self.layer}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.layer(torch.ones(1, 1)).sum()}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        return Outputs()

    def configure_optimizers(self) -> torch.optim.Optimizer:  # type: ignore[override]
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ToyData(LightningDataModule):
    def __init__(self, size: int = 6, shards: list[str] | None = None, train_size: int | None = None) -> None:
        super().__init__()
        self.size, self.shards, self.train_size = size, shards or [], train_size

    def check(self) -> None:
        for shard in self.shards:
            if not Path(shard).is_file():
                raise FileNotFoundError(f"train: found no shard at '{shard}', expected a tar file")

    def _loader(self, size: int, shuffle: bool = False) -> DataLoader[Any]:
        names: Any = [f"s{i:05d}" for i in range(size)]  # equal lengths: batches differ by their random numbers only
        if shuffle:
            names = ["s" * (i + 1) for i in range(size)]
        return DataLoader(
            names, batch_size=2, shuffle=shuffle, collate_fn=lambda keys: Batch(keys=keys, conversations=[[] for _ in keys])
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_size or 4000, shuffle=self.train_size is not None)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.size)


class MeanLoss(torchmetrics.MeanMetric):
    reads = ("loss",)

    def update(self, outputs: Outputs, batch: Batch) -> None:  # type: ignore[override]
        super().update(outputs.scalars["loss"], len(batch))


class Losses(Callback):
    """Appends every training loss to a file, and can send a signal to its own process."""

    def __init__(self, file: str, signal_at: int | None = None, signum: int = 15, in_validation: bool = False) -> None:
        self.file, self.signal_at, self.signum, self.in_validation = Path(file), signal_at, signum, in_validation

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self.file.open("a") as stream:
            stream.write(f"{trainer.global_step} {outputs['loss'].item():.9f}\n")
        if trainer.global_step == self.signal_at and not self.in_validation:
            self._signal()

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.signal_at and self.in_validation:
            self._signal()

    def _signal(self) -> None:
        os.kill(os.getpid(), self.signum)


class Crash(BaseException):
    """As good as a kill: nobody takes it for an error."""


class CrashAt(Callback):
    """Ends the process's run in a hook, at a step."""

    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step = hook, step
        setattr(self, hook, self._crash)

    def _crash(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            raise Crash


class SlowStart(Callback):
    """Says that training is being set up, on every rank, and takes a minute over it."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.is_global_zero:
            self.file.touch()
        time.sleep(60)


class Spoil(Callback):
    """After a step removes a file, cuts it off, or finds the disk full where it lies."""

    def __init__(self, step: int, action: str, file: str) -> None:
        self.step, self.action, self.file = step, action, Path(file)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and self.action == "remove":
            self.file.unlink()
        elif trainer.global_step == self.step and self.action == "fill the disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
        elif trainer.global_step == self.step:
            with self.file.open("r+b") as stream:
                stream.truncate(512)


class Trouble(Callback):
    """On one rank and at one step raises what a user can mend, or a bug; another rank then waits for this one's gradients."""

    def __init__(self, rank: int, bug: bool = False, step: int = 2, closes: bool = False) -> None:
        self.rank, self.bug, self.step, self.closes = rank, bug, step, closes

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.closes and trainer.global_rank == self.rank:  # as whatever tidies up after an error may do
            torch.distributed.destroy_process_group()
            time.sleep(1)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            if not self.bug:
                raise UserError("", "a long text", "a short one", row=1)
            pl_module.training_losses = _broken


def _broken(batch: Batch) -> dict[str, Tensor]:
    raise RuntimeError("no user can mend this")


class Sgd(OptimizerFactory):
    """Another optimiser."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def build(self, parts: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(parameters), "name": name} for name, parameters in parts.items()], self.lr)


class StepDown(Schedule):
    """A schedule that keeps settings of its own in its state."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def factor(self, step: int) -> float:
        return 1.0

    def build(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, self.total_steps)


def toy_experiment() -> dict[str, Any]:
    """A correct experiment of these parts."""
    return {
        "seed": 3,
        "vars": {"width": 3},
        "method": {
            "_target_": "toy_parts.Toy",
            "body": {"_target_": "toy_parts.Body", "in_dim": 4, "out_dim": "${vars.width}", "dropout": 0.5},
            "head": {"_target_": "toy_parts.Head", "in_dim": "${vars.width}"},
        },
        "training": {
            "trained": ["body", "head"],
            "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 0.01},
            "schedule": {"_target_": "umm_zoo.training.optimization.WarmupCosine", "total_steps": 12},
        },
        "data": {"_target_": "toy_parts.ToyData"},
        "metrics": {"loss": {"_target_": "toy_parts.MeanLoss"}},
        "trainer": {"max_steps": 4, "val_check_interval": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }


def write_yaml(file: Path, tree: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file
