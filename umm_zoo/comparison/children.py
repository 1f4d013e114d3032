"""Training processes of a comparison, stopped, and thereby saved, together with it."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any


class Children:
    """Training processes that are running at the moment; once ``stopped``, no more start.

    Each starts in a session of its own, so that the terminal's Ctrl-C does not reach it a second time; ``stop`` sends SIGTERM, on
    which ``umm_zoo.fit`` saves and ends. A comparison that died alone would leave them training, and a second one would then write
    into the same run folders.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()  # a signal handler may interrupt the thread that holds it

    def call(self, command: Sequence[str], log: IO[Any], environment: Mapping[str, str]) -> int:
        """Run a command to its end; returns its exit code, that of SIGTERM where it was not even started."""
        with self._lock:
            if self.stopped:
                return 128 + signal.SIGTERM
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """Let every process save and end, and start no more."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM call ``stop`` inside; only the main thread can set handlers, so elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, lambda *_: self.stop()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
