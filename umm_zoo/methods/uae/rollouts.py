"""Settings of rollouts: groups, the noise of a group's samples, micro-batches, equal samples; and the time of each phase."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from umm_zoo.backbones.equals import distinct
from umm_zoo.batch import Tokens
from umm_zoo.errors import Count


class GroupNoise(ABC):
    """Seeds of the initial noise of G samples for each of B rows."""

    @abstractmethod
    def __call__(self, num_rows: int, group: int) -> list[int]:
        """``num_rows * group`` seeds, the samples of one row next to each other, from torch's own generator."""


class SharedNoise(GroupNoise):
    """Seeds of one noise for all samples of a row: what they are compared by is then the caption and not luck.

    Whether UAE's authors share it is not known; recommended where G is small.
    """

    def __call__(self, num_rows: int, group: int) -> list[int]:
        """A seed per row, repeated."""
        return [seed for seed in _seeds(num_rows) for _ in range(group)]


class IndependentNoise(GroupNoise):
    """Seeds of a noise for every sample, as in Flow-GRPO."""

    def __call__(self, num_rows: int, group: int) -> list[int]:
        """A seed per sample."""
        return _seeds(num_rows * group)


def _seeds(count: int) -> list[int]:
    return torch.randint(0, 2**31 - 1, (count,)).tolist()


@dataclass(frozen=True)
class Rollouts:
    """Number of samples of each row, their noise and their use.

    Args:
        group: G, samples of each row, compared with one another.
        noise: seeds of a group; None is the stage's own.
        updates_per_rollout: optimiser steps on the same samples; 1 is on-policy, of more the loader's steps in between are not
            looked at.
        micro_batch: different samples that are generated, or scored with a gradient, at a time; None is all.

    Raises:
        ValueError: a group of one, or no update.
    """

    group: int
    noise: GroupNoise | None = None
    updates_per_rollout: Count = 1
    micro_batch: Count | None = None

    def __post_init__(self) -> None:
        if self.group < 2 or self.updates_per_rollout < 1:
            raise ValueError(
                f"found group {self.group} and updates_per_rollout {self.updates_per_rollout}, expected at least 2 and 1"
            )


def portions(rows: Tensor, size: int | None) -> list[Tensor]:
    """Row numbers in portions of at most ``size``; None keeps them together."""
    return list(rows.split(size or max(1, len(rows)))) if len(rows) else []


@dataclass(frozen=True)
class EqualSamples:
    """Samples that are scored together, those that are alike once.

    Shape:
        - rows: ``[r]``, numbers of the samples
        - firsts: ``[u]``, numbers of those that differ
        - places: ``[r]``, where each sample is among them
    """

    rows: Tensor
    firsts: Tensor
    places: Tensor


def portions_of_equals(rows: Tensor, kinds: Iterable[Hashable], size: int | None) -> list[EqualSamples]:
    """Samples of these numbers ``[r]`` in portions of at most ``size`` different ``kinds``, of which there is one per sample."""
    firsts, places = distinct(kinds)
    first, place = rows[firsts], rows.new_tensor(places)
    found = []
    for some in portions(torch.arange(len(firsts)), size):
        begin, end = int(some[0]), int(some[-1]) + 1
        own = (place >= begin) & (place < end)
        found.append(EqualSamples(rows[own], first[begin:end], place[own] - begin))
    return found


def rows_of(tokens: Tokens, rows: Tensor) -> Tokens:
    """Some rows of a set of tokens."""
    return Tokens(tokens.values[rows], None if tokens.mask is None else tokens.mask[rows])


class Phases:
    """Seconds spent in each phase of a step, device work included.

    Attributes:
        seconds: by name of the phase; cleared before every step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def clear(self) -> None:
        """Begin a step."""
        self.seconds, self._told = {}, {}

    def latest(self) -> dict[str, float]:
        """Seconds since this was last asked for in the step."""
        told, self._told = self._told, dict(self.seconds)
        return {name: value - told.get(name, 0.0) for name, value in self.seconds.items()}

    @contextmanager
    def __call__(self, name: str, device: torch.device) -> Iterator[None]:
        """Measure a block."""
        before = _now(device)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + _now(device) - before


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
