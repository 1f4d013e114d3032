"""A server on a socket, from its first request to its graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from umm_zoo.errors import UserError, say
from umm_zoo.serve.serving import Serving

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: Seconds that connections have for the last bytes of their replies.
_CLOSING = 5
#: Seconds in which another signal is still the first: ``timeout`` and the like send one to a process and to its group.
_ONE_SIGNAL = 0.5


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: there is no such address, or it is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            "--host and --port", f"{host}:{port} ({reason})", "a free address of this machine", "--port 0 finds one"
        ) from error


class Uvicorn(uvicorn.Server):
    """Server that a first signal lets finish what it has taken, and a second one ends at once.

    Args:
        app: the app.
        serving: what it serves.
        stop_timeout: seconds to finish.
    """

    def __init__(self, app: ASGIApp, serving: Serving, stop_timeout: float) -> None:
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=_CLOSING)
        super().__init__(config)
        self.serving, self.stop_timeout, self.stop_by = serving, stop_timeout, 0.0
        self.second_from = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals, and give them back afterwards; none is raised again, for they have been followed."""
        former = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop."""
        now = time.monotonic()
        if self.serving.stopping and now < self.second_from:
            return
        if self.serving.stopping:
            os.write(2, b"stopped at once by a second signal\n")
            os._exit(128 + sig)
        self.second_from, self.stop_by, self.serving.stopping = now + _ONE_SIGNAL, now + self.stop_timeout, True
        os.write(2, b"stopping: what was asked for is finished, a second signal ends at once\n")

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, ten times a second."""
        if self.serving.thread.failure is not None or (self.serving.stopping and self.serving.idle):
            return True
        if self.serving.stopping and time.monotonic() > self.stop_by:
            self.serving.give_up()
            await asyncio.sleep(0.2)  # to hear it
            return True
        return await super().on_tick(counter)


def run(app: ASGIApp, serving: Serving, listener: socket.socket, stop_timeout: float) -> None:
    """Serve until a signal comes.

    Raises:
        UserError: the model cannot be loaded.
    """
    serving.thread.thread.start()
    try:
        Uvicorn(app, serving, stop_timeout).run([listener])
    finally:
        serving.close()
    if serving.thread.failure is not None:
        raise serving.thread.failure
    say("stopped", stderr=True)


def leave(serving: Serving, code: int) -> None:
    """End the process with the model's thread in the middle of something, which would not let it end by itself."""
    serving.thread.thread.join(timeout=1)
    if serving.thread.thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
