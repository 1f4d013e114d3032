"""Solvers of the ordinary differential equation that carries noise (time 1) to data (time 0) along a velocity."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

#: Velocity ``dx/dt`` at a state and a time.
Velocity = Callable[[Tensor, float], Tensor]


class Solver(ABC):
    """Follows a velocity through given times, one evaluation of the network per step."""

    @abstractmethod
    def __call__(self, velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
        """The state at ``times[-1]``, from ``x`` at ``times[0]``; times fall."""


class Euler(Solver):
    """One straight step after the other, first order."""

    def __call__(self, velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
        """The state at the last time."""
        for now, after in itertools.pairwise(times):
            x = x + (after - now) * velocity(x, now)
        return x


class DPMSolver(Solver):
    """DPM-Solver++ of second order in its multistep form: extrapolates the predicted clean latent from the step before.

    Sana's sampler. On the straight path its first order is exactly Euler's step; the second adds
    ``(1 - t'/t) / 2 * (h / h_before) * (x0 - x0_before)``, h being the step in ``log((1 - t) / t)``. The steps from pure noise and
    to clean data, where h is infinite, stay first order.

    Reference: Lu et al., 2022, arXiv 2211.01095, algorithm 2; Sana, arXiv 2410.10629, section 3 (Flow-DPM-Solver).
    """

    def __call__(self, velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
        """The state at the last time."""
        clean_before: Tensor | None = None
        step_before = 0.0
        for now, after in itertools.pairwise(times):
            speed = velocity(x, now)
            clean = x - now * speed  # the data this velocity points at
            x = x + (after - now) * speed
            inner = after > 0 and now < 1
            step = _log_ratio(after) - _log_ratio(now) if inner else 0.0
            if inner and clean_before is not None and step_before > 0:
                x = x + 0.5 * (1 - after / now) * (step / step_before) * (clean - clean_before)
            clean_before, step_before = clean, step
        return x


def _log_ratio(time: float) -> float:
    return math.log((1 - time) / time)
