"""Means over a whole optimiser step, whatever the number of ranks and micro-batches that share it out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from umm_zoo.batch import Group, regroup
from umm_zoo.errors import UserError

#: Keys of a batch that an error names.
_NAMED = 8


def num_ranks() -> int:
    """Ranks that share out a step; 1 outside of a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among those that train together."""
    return dist.get_rank() if num_ranks() > 1 else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The same values added up over all ranks, which call this together."""
    if num_ranks() > 1:
        dist.all_reduce(values)
    return values


class StepMeans:
    """Weights that make means over a micro-batch into parts of the mean over its optimiser step; and the step's logged values.

    The trainer averages the losses of K micro-batches (of one rank), the exchange of gradients those of the ranks, each with equal
    weight. A mean over n units (answer tokens, images, rows), of which the step has N over all ranks and micro-batches, is
    therefore multiplied by ``K * ranks * n / N``: the average is then the mean over the N units, however they are shared out.

    Attributes:
        number: optimiser steps of this run before the one at hand, whatever its micro-batches, also in a run that was resumed.
    """

    def __init__(self) -> None:
        self.skips_left: int | None = None  # steps that may still be skipped; None where the first bad one ends the run
        self.skipping = False
        self.number = 0
        self.weightless = False  # whether the rows at hand stand in for bad ones, and count for nothing
        self._open = False  # within a training step: a validation shares nothing out
        self._micro_batches = 1
        self._totals: dict[str, Tensor] | None = None
        self._terms: list[tuple[Sequence[str], dict[str, Tensor]]] = []
        self._unchecked: _Unchecked | None = None

    @property
    def running(self) -> bool:
        """Whether the losses of a training step are being made."""
        return self._open

    @property
    def place(self) -> int:
        """Number of the micro-batch at hand in its step, from 0; 0 outside of a training step."""
        return len(self._terms) if self._open else 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches that the trainer takes the mean over; 1 outside of a training step."""
        return self._micro_batches if self._open else 1

    def resume(self, skips_left: int | None) -> None:
        """Go on with as many steps to skip as the interrupted run had left, where this one may skip any."""
        if self.skips_left is not None and skips_left is not None:
            self.skips_left = min(self.skips_left, skips_left)

    def begin(self, micro_batches: int, units: Mapping[str, float] | None, device: torch.device) -> None:
        """Begin a step of ``micro_batches`` per rank.

        Args:
            micro_batches: K, by which the trainer divides.
            units: this rank's units by name, of all its micro-batches; None where they become known with the losses (K is 1, or
                nobody could look ahead: then each micro-batch counts alone).
            device: of the totals.
        """
        self.check()
        self._micro_batches, self._terms, self._totals, self.skipping = micro_batches, [], None, False
        if units is not None:
            summed = sum_over_ranks(torch.tensor(list(units.values())).float().to(device, non_blocking=True))
            self._totals = dict(zip(units, summed.unbind(), strict=True))

    def share(self, unit: str, count: float | Tensor, device: torch.device) -> Tensor:
        """Weight of a mean over ``count`` units of this micro-batch, ``[]``; 1 outside of a training step.

        Raises:
            ValueError: the step's units do not name this one.
        """
        if not self._open or (self._totals is None and num_ranks() == 1):
            return torch.full((), 0.0 if self.weightless else 1.0, device=device)
        mine = _number(0 if self.weightless else count, device)
        shares = num_ranks() * (1 if self._totals is None else self._micro_batches)
        return shares * mine / self.total(unit, count, device).clamp(min=1e-12)

    def total(self, unit: str, count: float | Tensor, device: torch.device) -> Tensor:
        """Units of the whole step, ``[]``, of which this micro-batch has ``count``; those alone outside of a training step.

        Raises:
            ValueError: the step's units do not name this one.
        """
        mine = _number(0 if self.weightless else count, device)
        if not self._open:
            return mine
        if self._totals is None:
            return sum_over_ranks(mine.clone())
        if unit not in self._totals:
            raise ValueError(f"units: found {sorted(self._totals)}, expected '{unit}' among them")
        return self._totals[unit]

    @contextmanager
    def training(self, weightless: bool = False, sharded: bool = False) -> Iterator[None]:
        """The time in which the losses of a micro-batch are made; ``sharded`` says that ranks share out the weights."""
        self._open, self.weightless = True, weightless
        former = regroup.set(as_many_groups if sharded else list)
        try:
            yield
        finally:
            regroup.reset(former)
            self._open = self.weightless = False

    def weighed(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the rows at hand; zeros where they are weightless."""
        return {name: value * 0 if self.weightless else value for name, value in losses.items()}

    def add(self, losses: Mapping[str, Tensor], keys: Sequence[str]) -> None:
        """Take note of the terms of a micro-batch; every one of a step names the same."""
        self._terms.append((keys, {name: value.detach().float() for name, value in losses.items()}))

    def means(self, device: torch.device, number: int) -> dict[str, Tensor]:
        """The terms of step ``number``, over all micro-batches and ranks.

        Raises:
            UserError: one is not finite, on a GPU at the next call of this object.
        """
        names = list(self._terms[0][1])
        rows = torch.stack([torch.stack([terms[name].to(device) for name in names]) for _, terms in self._terms])  # [K, terms]
        means = sum_over_ranks(rows.sum(dim=0) / self._micro_batches) / num_ranks()
        checked = torch.cat([means[None], rows])
        self._unchecked = _Unchecked(number, names, [keys for keys, _ in self._terms], checked.to("cpu", non_blocking=True), None)
        if device.type == "cuda":
            self._unchecked.copied = torch.cuda.Event()
            self._unchecked.copied.record()
        if device.type != "cuda" or self.skips_left is not None:
            self.check()
        return dict(zip(names, means.unbind(), strict=True))

    def check(self) -> None:
        """Look at the losses of the step that was made last; called before the next one and before weights are saved.

        Raises:
            UserError: a term is not finite, and no step may be skipped (any more).
        """
        last, self._unchecked = self._unchecked, None
        if last is None:
            return
        if last.copied is not None:
            last.copied.synchronize()
        if last.values[0].isfinite().all():
            return
        found = "; ".join(filter(None, _over_ranks(last.bad_terms())))
        if self.skips_left:
            self.skips_left, self.skipping = self.skips_left - 1, True
            rank_zero_warn(f"step {last.number} is skipped: {found}; {self.skips_left} more may be")
            return
        allowed = "" if self.skips_left is None else ", after as many skipped steps as training.max_skipped_steps allows"
        hint = "the last checkpoint is from before; try a smaller learning rate, trainer.gradient_clip_val or training.on_nan=skip"
        raise UserError(f"step {last.number}", f"{found}{allowed}", "finite losses", hint)


def _number(value: float | Tensor, device: torch.device) -> Tensor:
    """``[]`` in float32 on a device, for which nothing waits."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32, non_blocking=True)
    return torch.full((), value, dtype=torch.float32, device=device)


def blocks_are_sharded() -> bool:
    """Whether every rank must call each block as often as the others, on a blank image where it has none."""
    return regroup.get() is as_many_groups


def as_many_groups(groups: list[Group]) -> list[Group]:
    """Groups of images split until all ranks, which call this together, have as many.

    Where weights are shared out every call of a network gathers them from all ranks. A rank with fewer images than another has
    groups adds stand-ins: an image of its smallest size, which counts for nothing.

    Raises:
        ValueError: there is no image to stand in.
    """
    if not groups:
        raise ValueError("images: found none on a rank while weights are shared out, expected a blank one in their place")
    most = torch.full((), len(groups), device=groups[0][1].device)
    if num_ranks() > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    split = list(groups)
    while len(split) < int(most):
        number = max(range(len(split)), key=lambda own: len(split[own][0]))
        places, stack = split[number]
        if len(places) < 2:
            smallest = min((stack for _, stack in split), key=lambda stack: stack[0].numel())
            return split + [([], smallest[:1])] * (int(most) - len(split))
        half = len(places) // 2
        split[number : number + 1] = [(places[:half], stack[:half]), (places[half:], stack[half:])]
    return split


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Refuse to go on from weights that a gradient which was not finite has spoilt, though the losses were.

    Raises:
        UserError: names the first such tensor.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            hint = "the last checkpoint is from before; try a smaller learning rate or trainer.gradient_clip_val"
            raise UserError("weights", f"values that are not finite in '{name}'", "finite ones", hint)


@dataclass
class _Unchecked:
    """Terms of a step that nobody has looked at yet: their means over the step, and those of each micro-batch of this rank."""

    number: int
    names: list[str]
    keys: list[Sequence[str]]
    values: Tensor
    copied: torch.cuda.Event | None

    def bad_terms(self) -> str:
        """What is not finite on this rank, and the batch where it is; empty where all is well here."""
        for keys, row in zip(self.keys, self.values[1:], strict=True):
            bad = [f"{name} is {float(value)}" for name, value in zip(self.names, row, strict=True) if not value.isfinite()]
            if bad:
                return f"{', '.join(bad)} in the batch of {', '.join(keys[:_NAMED])}{', …' if len(keys) > _NAMED else ''}"
        return ""


def _over_ranks(text: str) -> list[str]:
    texts = [text] * num_ranks()
    if len(texts) > 1:
        dist.all_gather_object(texts, text)
    return texts


def whole_steps(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """The same micro-batches, read ``size`` at a time; the first of each optimiser step holds the others, see ``Batch.ahead``."""
    iterator = iter(batches)
    while step := list(islice(iterator, size)):
        step[0].ahead = step[1:]
        yield from step
