"""Thread that writes while training goes on. Nothing here imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from threading import enumerate as running
from typing import Any

#: Name of the threads.
_NAME = "checkpoint"


class Writer:
    """One task at a time beside the training; what it raises is raised again where the training next asks.

    The process does not end before the task has: a thread of this kind is waited for.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Begin a task; the one before it is waited for, and its error raised."""
        self.wait()
        self._thread = Thread(target=self._do, args=(task,), name=_NAME)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being done, or raise what was met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def look(self) -> None:
        """Raise what was met by a task that has ended; one that goes on is not waited for."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def _do(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # for the training's own thread
            self._error = error


class WritesBehind(ABC):
    """Something that copies a checkpoint in memory and writes the copy while training goes on: a plug-in, or a strategy.

    Attributes:
        writer: the thread that writes.
        by_every_rank: each rank writes its part of a checkpoint; else rank 0 writes all of it.
    """

    writer: Writer
    by_every_rank = False

    @abstractmethod
    def begin(self, checkpoint: dict[str, Any], path: Path, then: Callable[[], None]) -> None:
        """Copy ``checkpoint`` in memory now, and write the copy beside the training; ``then`` is called there, by rank 0, once it
        stands. Of copies there is one at most: the one before is waited for.

        Raises:
            UserError: it cannot be copied, or the one before it could not be written.
        """


def wait_for_writers() -> None:
    """Return when no checkpoint is being written: for a process that ends at once."""
    for thread in running():
        if thread.name == _NAME:
            thread.join()
