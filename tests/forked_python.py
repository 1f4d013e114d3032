"""What stands in for ``python`` beside a nursery: a command is forked there, with this process's streams, folder and environment.

``forked_python.py SOCKET PYTHON ARGUMENT…`` is a process of a few milliseconds that ends as the forked one does, hands on the
signals that it gets, and takes it along when it is killed. What the nursery cannot run as a fresh interpreter would is PYTHON's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

#: What is handed on; SIGKILL is by the connection that breaks.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def ask(place: str, order: Mapping[str, Any], streams: Sequence[int]) -> tuple[IO[str], int]:
    """Have a command begun; the connection, on which its exit code will stand, and its process id, 0 where it is refused."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        content = json.dumps(order).encode() + b"\n"
        sent = socket.send_fds(connection, [content], streams)
        connection.sendall(content[sent:])
        answers = connection.makefile("r", encoding="ascii")
    return answers, int(answers.readline() or "0")


def main(place: str, python: str, *argv: str) -> int:
    """Run one command; returns its exit code."""
    order = {"argv": argv, "folder": os.getcwd(), "environment": dict(os.environ), "asks": os.getpid()}
    answers, pid = ask(place, order, [0, 1, 2])
    if not pid:
        os.execv(python, [python, *argv])
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(answers.readline() or -signal.SIGKILL)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code in SIGNALS else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
