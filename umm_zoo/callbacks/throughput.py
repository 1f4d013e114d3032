"""Speed of a run, and where its time goes."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from umm_zoo.batch import Batch
from umm_zoo.errors import Count
from umm_zoo.method import Method
from umm_zoo.objectives.step import num_ranks
from umm_zoo.outputs import TokenCount, TokenCounts, add_counts, stand_in_counts

PHASES = ("data", "forward_backward", "optimiser")

Stamp = float | torch.cuda.Event


class Throughput(Callback):
    """Callback that logs ``throughput/...`` every few steps: samples and tokens per second, parts of the step time, peak memory.

    - ``samples_per_s`` and ``images_per_s`` (input images, and images to generate), over all ranks and micro-batches.
    - Where the method counts tokens (``Method.token_counts``): ``tokens_per_s``, those that rows hold; ``computed_tokens_per_s``,
      with padding and with what stands in for nothing; ``useful_share``, the first over the second. For each kind that the method
      tells apart (``text``, ``image``, ``query`` …): ``KIND_tokens_per_s``, useful ones, and ``useful_KIND_share``. Nothing is read
      from the device before a log step.
    - ``step_ms``, mean over the steps since the last entry, and its parts ``data_ms`` (from the end of one step to the start of the
      next: waiting for the loader, moving the batch, other callbacks such as one that writes a checkpoint), ``forward_backward_ms``
      and ``optimiser_ms`` (clipping, the update, the end of the step). The parts add up to the step. Validation is not counted.
    - ``peak_memory_gb``: of the accelerator since the start, or of this process where there is none.

    On CUDA the moments are marked by events in the stream, which costs no synchronisation; the callback waits for the device at log
    steps only. There, ``data_ms`` is how long the device was left without work between steps.

    Args:
        every_n_steps: optimiser steps between two entries, however many micro-batches each is made of.

    Raises:
        ValueError: every_n_steps is not positive.
    """

    def __init__(self, every_n_steps: Count = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Throughput.every_n_steps: found {every_n_steps}, expected 1 or more")
        self.every_n_steps = every_n_steps
        self.values: dict[str, float] = {}  # the last entry
        self._on_cuda = self._stepping = False
        self._restart(None)

    def _restart(self, mark: Stamp | None) -> None:
        """Forget all, with ``mark`` as the moment from which the next phase counts."""
        self._mark = mark
        self._spans: list[tuple[str, Stamp, Stamp]] = []
        self._steps = self._samples = self._images = 0
        self._tokens: TokenCounts = {}

    def _now(self) -> Stamp:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self, phase: str) -> None:
        """Everything since the last mark was ``phase``."""
        now = self._now()
        if self._mark is not None:
            self._spans.append((phase, self._mark, now))
        self._mark = now

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._on_cuda = pl_module.device.type == "cuda"
        self._restart(self._now())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """The batch is here."""
        self._stepping = False
        self._close("data")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """The gradients are here."""
        self._stepping = True
        self._close("forward_backward")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The step is over; while gradients accumulate there was no update."""
        self._close("optimiser" if self._stepping else "forward_backward")
        self._steps += self._stepping
        counts = (isinstance(pl_module, Method) and pl_module.token_counts) or {}
        self._tokens = add_counts(self._tokens, stand_in_counts(counts) if batch.stands_in else counts)
        if not batch.stands_in:
            self._samples, self._images = self._samples + len(batch), self._images + len(batch.images) + len(batch.requested)
        if self._stepping and self._steps >= self.every_n_steps:
            self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._mark = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._mark = self._now()

    def _log(self, trainer: Trainer) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, start, end in self._spans:
            seconds[phase] += _seconds(start, end)
        total = sum(seconds.values())
        self.values = {f"throughput/{name}": value for name, value in self._rates(total).items()}
        self.values["throughput/step_ms"] = 1000 * total / self._steps
        for phase in PHASES:
            self.values[f"throughput/{phase}_ms"] = 1000 * seconds[phase] / self._steps
        self.values["throughput/peak_memory_gb"] = peak_memory(self._on_cuda) / 1e9
        # straight to the loggers: `self.log` would drop what does not fall on the trainer's own log steps
        for logger in trainer.loggers:
            logger.log_metrics(self.values, step=trainer.global_step)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self.values.items()})
        self._restart(self._mark)

    def _rates(self, seconds: float) -> dict[str, float]:
        """What all ranks did, per second, and which shares of it were useful."""
        tokens = {kind: TokenCount(*(int(number) for number in count)) for kind, count in self._tokens.items()}
        done = [(self._samples, self._images, tokens)] * num_ranks()
        if len(done) > 1:
            dist.all_gather_object(done, done[0])
        samples, images, counts = zip(*done, strict=True)
        rates = {"samples_per_s": sum(samples) / seconds, "images_per_s": sum(images) / seconds}
        kinds = {kind: (int(count.useful), int(count.computed)) for kind, count in add_counts(*counts).items()}
        for kind, (useful, computed) in kinds.items():
            rates |= {f"{kind}_tokens_per_s": useful / seconds, **_share(f"useful_{kind}_share", useful, computed)}
        if kinds:
            useful, computed = (sum(column) for column in zip(*kinds.values(), strict=True))
            rates |= {"tokens_per_s": useful / seconds, "computed_tokens_per_s": computed / seconds}
            rates |= _share("useful_share", useful, computed)
        return rates


def _share(name: str, useful: int, computed: int) -> dict[str, float]:
    """A share of nothing is none."""
    return {name: useful / computed} if computed else {}


def _seconds(start: Stamp, end: Stamp) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    return float(start.elapsed_time(end)) / 1000


def peak_memory(on_cuda: bool) -> int:
    """Bytes at the highest point: allocated on the current CUDA device, or resident in this process."""
    if on_cuda:
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
