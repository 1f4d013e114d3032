"""The objects of an experiment, and how its method is trained: which parts, with which optimiser and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import Callback, LightningDataModule
from torch import nn
from torchmetrics import Metric

from umm_zoo.errors import REFUSALS, Natural, UserError, did_you_mean, locating, note, several
from umm_zoo.experiment.build import build, build_method
from umm_zoo.experiment.check import TRAINING
from umm_zoo.experiment.file import Experiment
from umm_zoo.experiment.trust import trusting
from umm_zoo.experiment.types import TARGET
from umm_zoo.method import Method
from umm_zoo.metrics.scores import logged_names, unknown_score
from umm_zoo.objectives.step import whole_steps
from umm_zoo.training.compilation import Compilation
from umm_zoo.training.optimization import OptimizerFactory, Schedule
from umm_zoo.training.ranks import is_main_process
from umm_zoo.training.recomputation import recompute

#: Weights that rounding holds where they are: an update under a 256th (bfloat16) or 2,048th (float16) of one changes nothing.
_COARSE = (torch.bfloat16, torch.float16)
#: First parts of the names under which a run logs.
_PREFIXES = ("val", "train", "rollout", "throughput")


class TrainingSetup:
    """The ``training`` map of an experiment. A method is built, generates and is scored without it.

    Args:
        trained: names of the parts that are trained; all others are frozen.
        optimizer: builds the optimiser over them.
        schedule: learning rate over the steps; None is constant.
        on_nan: what becomes of a step with a loss that is not finite: ``stop`` ends the run, ``skip`` makes no update.
        max_skipped_steps: steps that may be skipped before the run ends all the same.
        weights: of the stage that this one comes ``after``: its averages where it keeps them, or the raw ones all the same.
        offload: names of frozen parts that no gradient passes: they wait on the CPU, and are on the device one at a time, while
            they compute.
        compile: names of parts that torch compiles for training steps, see ``Compilation``, which has options.
        checkpointing: which layers of the parts that a gradient passes are computed again in the backward pass, in place of what
            the parts say themselves: 1 is every layer, 2 every second one, 0 none; ``auto`` takes the first of none, every second
            and every one that ``--check``'s estimate finds to fit the device's memory.
        tf32: products of float32 matrices on GPUs round their inputs to 10 bits, as the released trainings of LLaVA, ROSS,
            MetaQuery and Flow-GRPO set it; on a CPU, and for matrices in half precision, nothing changes.
    """

    def __init__(
        self,
        trained: list[str],
        optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        on_nan: Literal["stop", "skip"] = "stop",
        max_skipped_steps: Natural = 10,
        weights: Literal["averaged", "raw"] = "averaged",
        offload: Sequence[str] = (),
        compile: Sequence[str] | Compilation = (),
        checkpointing: Natural | Literal["auto"] | None = None,
        tf32: bool = True,
    ) -> None:
        several("training.offload", offload)
        self.trained, self.optimizer, self.schedule, self.offload = list(trained), optimizer, schedule, list(offload)
        self.skips = max_skipped_steps if on_nan == "skip" else None
        self.checkpointing, self.tf32 = checkpointing, tf32
        self.compilation = compile if isinstance(compile, Compilation) else Compilation(compile) if compile else None

    def prepare(self, method: Method) -> None:
        """Freeze what is not trained, and let the method ask here for its optimiser; note weights too coarse for small updates.

        Raises:
            UserError: a name is not a part, or one that this method never trains.
        """
        method.train_only(self.trained, self.build)
        method.offload(self.offload)
        if isinstance(self.checkpointing, int):
            recompute(method, self.checkpointing)
        if self.compilation is not None:
            self.compilation.check(method, self.offload)
        method.step.skips_left = self.skips
        parts = method.all_parts()
        coarse = [name for name in self.trained if any(p.dtype in _COARSE and p.requires_grad for p in parts[name].parameters())]
        if coarse and is_main_process():
            kept = "dtype: float32 keeps them, and trainer.precision: bf16-mixed the speed"
            note(
                f"training.trained: {', '.join(coarse)} in half precision, where updates far smaller than a weight are lost; {kept}"
            )

    def set_products(self) -> None:
        """Let this process compute with ``tf32`` or without."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32

    def build(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> Any:
        """Optimiser and schedule (stepped per update) over the parameters of each trained part, as Lightning wants them."""
        if not any(map(len, parameters.values())):
            raise UserError("training.trained", f"{self.trained}, which hold no weights", "at least one part that does")
        with locating(place="training", refusals=REFUSALS):
            optimizer = self.optimizer.build(parameters)
            if self.schedule is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule.build(optimizer), "interval": "step"}}


@dataclass
class Built:
    """The objects of an experiment; those parts of the method that are not trained are frozen."""

    method: Method
    data: LightningDataModule
    callbacks: dict[str, Callback]
    metrics: dict[str, Metric]
    setup: TrainingSetup | None = None

    def owners(self) -> dict[str, Any]:
        """Callbacks and metrics by their places in the experiment."""
        callbacks = {f"callbacks.{name}": callback for name, callback in self.callbacks.items()}
        return callbacks | {f"metrics.{name}": metric for name, metric in self.metrics.items()}


def build_data(experiment: Experiment) -> LightningDataModule:
    """Build the data module of a checked experiment.

    Raises:
        UserError: its constructor, or one below it, refused its arguments.
    """
    with locating(experiment.file):
        data: LightningDataModule = build(experiment.data, "data")
    for hook in ("prepare_data", "setup", "train_dataloader", "val_dataloader"):
        setattr(data, hook, _DataHook(getattr(data, hook), experiment.file))
    data.train_dataloader = _TrainingLoader(data.train_dataloader, data)  # type: ignore[method-assign]
    return data


class _WholeSteps:
    """Training loader of any data module, read a whole optimiser step at a time where gradients are accumulated."""

    def __init__(self, loader: Any, per_step: int) -> None:
        self._loader, self._per_step = loader, per_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return whole_steps(self._loader, self._per_step)


class _DataHook:
    """A hook of a data module; what it refuses is said to be of the data."""

    def __init__(self, hook: Callable[..., Any], file: str) -> None:
        self.__wrapped__, self.file = hook, file  # by this name Lightning sees whether the class has a hook of its own

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with locating(self.file, "data", REFUSALS):
            return self.__wrapped__(*arguments, **named)


class _TrainingLoader:
    """The hook that makes the training loader; a loader that does not read whole optimiser steps by itself is made to."""

    def __init__(self, hook: Callable[[], Any], data: LightningDataModule) -> None:
        self.__wrapped__, self.data = hook, data

    def __call__(self) -> Any:
        loader, trainer = self.__wrapped__(), self.data.trainer
        per_step = 1 if trainer is None else trainer.accumulate_grad_batches
        return loader if per_step in (1, getattr(loader, "per_step", 1)) else _WholeSteps(loader, per_step)


def check_data(data: LightningDataModule, file: str) -> None:
    """Let a data module that has a ``check()`` say what is missing (``ShardData`` does); others say it when they are set up.

    Raises:
        UserError: a shard is missing, empty or damaged.
    """
    with locating(file, "data", REFUSALS):
        if callable(inspect := getattr(data, "check", None)):
            inspect()


def build_experiment(experiment: Experiment, data: LightningDataModule | None = None) -> Built:
    """Build the parts of a checked experiment. The method comes first, so that its weights depend on the seed alone.

    Args:
        experiment: what to build.
        data: the data module, where it has been built already.

    Raises:
        UserError: a constructor refused its arguments, a metric reads what the method does not make; the line names the node.
    """
    with locating(experiment.file), trusting(experiment.named_modules):
        method: Method = build_method(experiment.method_tree)
        built = Built(
            method,
            data if data is not None else build_data(experiment),
            {name: build(node, f"callbacks.{name}") for name, node in experiment.callbacks.items()},
            {name: build(node, f"metrics.{name}") for name, node in experiment.metrics.items()},
        )
        if experiment.training:
            with locating(place="training"):
                built.setup = build({TARGET: TRAINING, **experiment.training}, "training")
                built.setup.prepare(method)
        check_outputs(method, built.metrics)
    with locating(experiment.file):
        check_monitors(built)
    if built.metrics and experiment.trainer.get("limit_val_batches") == 0 and is_main_process():
        note(f"trainer.limit_val_batches is 0: none of the metrics ({', '.join(built.metrics)}) will be scored")
    return built


def check_outputs(method: Method, metrics: Mapping[str, Metric]) -> None:
    """Refuse a metric that reads what the method does not make; one that does not say what it reads is taken as it is.

    Raises:
        UserError: names metric, output and method.
    """
    if (makes := method.makes) is None:
        return
    for name, metric in metrics.items():
        for wanted in sorted(reads(metric)):
            if wanted not in makes:
                found = f"a {type(metric).__name__}, which reads '{wanted}'; {type(method).__name__} does not make it"
                raise UserError(f"metrics.{name}", found, f"a metric of {', '.join(sorted(makes))}")


def check_monitors(built: Built) -> None:
    """Refuse a callback that watches what the run never logs, before hours of training.

    A method of a user's own may log names of its own: there it is a note.

    Raises:
        UserError: names callback and key.
    """
    for place, callback in built.callbacks.items():
        if not isinstance(key := getattr(callback, "monitor", None), str):
            continue
        prefix, _, score = key.partition("/")
        if (prefix in _PREFIXES and score and prefix != "val") or key == "loss":
            continue
        known = [*(f"val/{name}" for name in logged_names(built.metrics)), "train/loss"]
        if prefix == "val" and score:
            if (meant := unknown_score(score, built.metrics)) is None:
                continue
            hint = did_you_mean(meant and f"val/{meant}")
        else:
            hint = did_you_mean(key, known)
        found = f"'{key}', which nothing logs"
        if type(built.method).__module__.startswith("umm_zoo."):
            raise UserError(f"callbacks.{place}.monitor", found, ", ".join(known), hint)
        if is_main_process():
            note(f"callbacks.{place} monitors {found} unless the method does ({', '.join(known)})")


def metrics_of(experiment: Experiment) -> dict[str, Metric | None]:
    """The metrics of an experiment on the meta device, to be asked for names; None for one that cannot be built."""
    built: dict[str, Metric | None] = {}
    for name, node in experiment.metrics.items():
        try:
            with torch.device("meta"):
                built[name] = build(node, f"metrics.{name}")
        except UserError:  # it is refused where it is trained
            built[name] = None
    return built


def reads(metric: Metric) -> frozenset[str]:
    """The parts of ``Outputs`` that a metric says it reads: fields, and scalars by name."""
    return frozenset(getattr(metric, "reads", ()))
