"""Real processes without the seconds of importing torch: forked from one that has imported it (nursery_server.py), one a session.

``Nursery.python`` is a program that stands in for ``sys.executable`` before ``-m MODULE`` and ``-c CODE``; ``Nursery.run`` starts
``umm_zoo.fit``. A process can be killed from outside at any moment, or asked to kill itself at its n-th write, flush, rename or
removal of a checkpoint. What a test claims of imports, of the time they take or of what is installed needs a fresh interpreter.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from forked_python import ask

ROOT = Path(__file__).resolve().parents[1]
#: Variables that say which rank of which launch a process is.
LAUNCH = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "SLURM_JOB_ID")


class Nursery:
    """Starts processes with the libraries imported already."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nursery-")
        self._place = f"{self._folder.name}/socket"
        self._answers: dict[int, IO[str]] = {}
        #: A program that does what Python would.
        self.python = f"{self._folder.name}/python"
        program = [sys.executable, "-IS", str(ROOT / "tests" / "forked_python.py"), self._place, sys.executable]
        Path(self.python).write_text(f'#!/bin/sh\nexec {shlex.join(program)} "$@"\n')
        Path(self.python).chmod(0o755)
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCH}
        self.environment = {**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        server = [sys.executable, str(ROOT / "tests" / "nursery_server.py"), self._place, self.python]
        self.process = subprocess.Popen(
            server, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "0\n"

    def start(
        self,
        folder: Path,
        *argv: str,
        kill_at: int | None = None,
        kill_in: int | None = None,
        largest_file: int | None = None,
        environment: dict[str, str] | None = None,
        log: str = "log.txt",
    ) -> int:
        """Begin a run in ``folder``; returns the process id. ``kill_at`` counts steps of writing a checkpoint, ``kill_in`` moments
        around validations, rows of the log and the report."""
        order = {
            "argv": ["-m", "umm_zoo.fit", *argv],
            "folder": str(folder),
            "environment": {**self.environment, **(environment or {})},
            "kills": {"kill_at": kill_at, "kill_in": kill_in, "largest_file": largest_file},
            "asks": os.getpid(),
        }
        with (folder / log).open("ab") as said, open(os.devnull, "rb") as nothing:
            answers, pid = ask(self._place, order, [nothing.fileno(), said.fileno(), said.fileno()])
        assert pid, "this one needs a fresh interpreter"
        self._answers[pid] = answers
        return pid

    def wait(self, pid: int) -> int:
        """The exit code, or minus the signal that ended it."""
        with self._answers.pop(pid) as answers:
            return int(answers.readline())

    def run(self, folder: Path, *argv: str, **options: Any) -> tuple[int, str]:
        """Run to the end; (exit code, what was said)."""
        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        code = self.wait(self.start(folder, *argv, **options))
        return code, log.read_text()

    def run_ranks(self, folder: Path, count: int, *argv: str) -> tuple[int, str]:
        """Run as several ranks, as a cluster's launcher starts them; (the largest exit code, what was said)."""
        codes, said = self.codes_of_ranks(folder, count, *argv)
        return max(codes, key=abs), "".join(said)

    def codes_of_ranks(self, folder: Path, count: int, *argv: str) -> tuple[list[int], list[str]]:
        """The exit code of each rank, and what it has said."""
        codes = [self.wait(pid) for pid in self.start_ranks(folder, count, *argv)]
        return codes, [(folder / f"log{rank}.txt").read_text() for rank in range(count)]

    def start_ranks(self, folder: Path, count: int, *argv: str, kill_at: Mapping[int, int] | None = None) -> list[int]:
        """Begin as several ranks; returns their process ids. ``kill_at`` is of each rank that is to end so."""
        port = str(20000 + (os.getpid() * 7 + int(time.monotonic() * 1000)) % 20000)
        many = [*argv, f"trainer.devices={count}"]
        shared = {"WORLD_SIZE": str(count), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(count):
            (folder / f"log{rank}.txt").unlink(missing_ok=True)
        kills = dict(kill_at or {})
        return [
            self.start(
                folder, *many, environment={**shared, "LOCAL_RANK": str(rank)}, log=f"log{rank}.txt", kill_at=kills.get(rank)
            )
            for rank in range(count)
        ]

    def close(self) -> None:
        """End it, and what it has started."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
        for answers in self._answers.values():
            answers.close()
        self._folder.cleanup()
