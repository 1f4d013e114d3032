"""One thread that holds the model: what waits together and has equal settings is answered in one batch."""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from umm_zoo.errors import UserError
from umm_zoo.generation.base import Command
from umm_zoo.generation.requests import Request, Result

if TYPE_CHECKING:
    from umm_zoo.generation.model import Model


@dataclass(eq=False)
class Job:
    """One answer or one image to be made.

    Args:
        command: what makes it.
        request: of what.
        deliver: takes the result or the error, in the model's thread, once.
    """

    command: Command
    request: Request
    deliver: Callable[[Result | Exception], None]
    gone: bool = False  #: nobody waits for it any more
    done: bool = False
    since: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple[Command, dict[str, Any]]:
        """What jobs of one batch have in common."""
        return self.command, {**self.request.settings, "seed": None}

    def finish(self, result: Result | Exception) -> None:
        """Hand over the result, if nothing was handed over yet."""
        if not self.done:
            self.done = True
            self.deliver(result)


class ModelThread:
    """Thread that loads a model and answers jobs, the oldest first and with it the others of its kind.

    Args:
        load: gives the model.
        batch_size: most jobs of a batch.
        window: seconds that the oldest job waits for others of its kind.
        changed: called in the thread when the model is there, or ``failure`` says why it is not.
    """

    def __init__(self, load: Callable[[], Model], batch_size: int, window: float, changed: Callable[[], None]) -> None:
        self.load, self.batch_size, self.window, self.changed = load, batch_size, window, changed
        self.model: Model | None = None
        self.failure: BaseException | None = None
        self.batches = 0
        self._seconds = 1.0  # of the last batch
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._ended = False
        self._change = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Jobs that no batch has taken yet."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        with self._change:
            return not self._waiting and not self._running

    @property
    def patience(self) -> int:
        """Seconds after which it may be worth while to ask again."""
        return max(1, min(60, math.ceil(self._seconds * (1 + len(self._waiting) / self.batch_size))))

    def put(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait."""
        with self._change:
            self._waiting += jobs
            self._change.notify()

    def drop(self, jobs: Sequence[Job]) -> None:
        """Forget jobs; an answer that is being given ends at its next token."""
        with self._change:
            for job in jobs:
                job.gone = True
            self._waiting = [job for job in self._waiting if not job.gone]

    def end(self) -> None:
        """Take no more batches."""
        with self._change:
            self._ended = True
            self._change.notify()

    def _work(self) -> None:
        try:
            self.model = self.load()
        except BaseException as error:
            self.failure = error
        self.changed()
        while self.model is not None and (jobs := self._take()):
            begun = time.monotonic()
            self._answer(self.model, jobs)
            self._seconds, self.batches = time.monotonic() - begun, self.batches + 1
            with self._change:
                self._running = jobs = []  # nothing of them is held while nothing is to be done

    def _take(self) -> list[Job]:
        """The next batch; nothing at the end."""
        with self._change:
            while not self._ended:
                if not self._waiting:
                    self._change.wait()
                    continue
                kind, rest = self._waiting[0].kind, self._waiting[0].since + self.window - time.monotonic()
                jobs = [job for job in self._waiting if job.kind == kind][: self.batch_size]
                if len(jobs) == self.batch_size or rest <= 0:
                    self._waiting = [job for job in self._waiting if job not in jobs]
                    self._running = jobs
                    return jobs
                self._change.wait(rest)
        return []

    def _answer(self, model: Model, jobs: list[Job]) -> None:
        """Answer a batch; where it fails, each job alone, so that one job's fault is its own."""
        from umm_zoo.generation.running import run_batch

        try:
            results = run_batch(model, jobs[0].command, [job.request for job in jobs])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    if not job.done and not job.gone:
                        self._answer(model, [job])
                return
            if not isinstance(error, UserError):
                traceback.print_exc(file=sys.stderr)
            jobs[0].finish(error)
        else:
            for job, result in zip(jobs, results, strict=True):
                job.finish(result)
