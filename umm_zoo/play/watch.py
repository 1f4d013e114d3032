"""Progress of a request while a method works on it, and its end on request, whatever the method is made of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from umm_zoo.blocks.denoisers import Denoiser
from umm_zoo.errors import lasting

#: Modules that are watched lie so deep in a method at most: parts, and the library's networks inside them.
DEPTH = 3

#: Share of the work that is done, 0 to 1, or None where that is not known; and a line that says how long the rest takes.
Report = Callable[[float | None, str], None]


class Cancelled(Exception):  # noqa: N818 - not an error
    """A request was ended by the one who made it."""


class Watch:
    """Counts the calls of a method's networks. How many there will be is known from the request of the same kind before.

    Before the first, the calls of the denoiser are held against the number of steps.

    Args:
        method: the method.
    """

    def __init__(self, method: nn.Module) -> None:
        self.networks = [module for name, module in method.named_modules() if name and name.count(".") < DEPTH]
        self._known: dict[Any, int] = {}

    @contextmanager
    def over(
        self, kind: Any, steps: int | None, place: tuple[int, int], report: Report, cancelled: threading.Event
    ) -> Iterator[None]:
        """Around the work on one request.

        Args:
            kind: requests of one kind take as many calls.
            steps: of its sampler, where it has one.
            place: of this request among those of a call, and how many these are.
            report: called now and then.
            cancelled: set by somebody who wants it to end.

        Raises:
            Cancelled: it was.
        """
        began, counts, said = time.monotonic(), {"all": 0, "steps": 0}, [0.0]

        def called(module: nn.Module, arguments: Any) -> None:
            if cancelled.is_set():
                raise Cancelled
            counts["all"] += 1
            counts["steps"] += isinstance(module, Denoiser)
            now = time.monotonic()
            if now - said[0] >= 0.2:
                said[0] = now
                share = self._share(kind, counts, steps)
                report(*progress(share, now - began, place))

        handles = [network.register_forward_pre_hook(called) for network in self.networks]
        try:
            yield
            self._known[kind] = counts["all"]
        finally:
            for handle in handles:
                handle.remove()

    def _share(self, kind: Any, counts: dict[str, int], steps: int | None) -> float | None:
        if known := self._known.get(kind):
            return min(0.99, counts["all"] / known)
        return min(0.99, counts["steps"] / steps) if steps and counts["steps"] else None


def progress(share: float | None, seconds: float, place: tuple[int, int]) -> tuple[float | None, str]:
    """Share of a whole call that is done, and its line, where ``share`` of the request at ``place`` took some ``seconds``."""
    number, count = place
    which = f"{number + 1} of {count}, " if count > 1 else ""
    if not share:
        return (number / count or None), f"{which}{lasting(seconds)} so far"
    left = seconds / share * (count - number - share)
    return (number + share) / count, f"{which}about {lasting(left)} left"
