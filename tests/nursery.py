"""Real processes that run ``fit`` without the seconds of importing torch: forked from one that has imported it.

Run as a program it obeys lines of JSON on stdin; the class is the other side. A process can be killed from outside at any moment,
or asked to kill itself at its n-th write, flush, rename or removal of a checkpoint.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Nursery:
    """Starts processes of ``python -m umm_zoo.fit``, with some modules imported already."""

    def __init__(self, *modules: str) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "SLURM_JOB_ID")
        environment = {key: value for key, value in os.environ.items() if key not in names}
        environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def _ask(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

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
        order = {"argv": argv, "folder": str(folder), "kill_at": kill_at, "largest_file": largest_file, "log": log}
        order["kill_in"] = kill_in
        return int(self._ask(**order, environment=environment or {}))

    def wait(self, pid: int) -> int:
        """The exit code, or minus the signal that ended it."""
        return int(self._ask(wait=pid))

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
        """End it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


def _die_at(number: int) -> None:
    """SIGKILL this process at its ``number``-th step of writing a checkpoint; one checkpoint takes about a dozen.

    A step is in the middle of every 16 KiB, and each flush, rename and removal.
    """
    from umm_zoo.checkpoints import output

    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Any) -> Any:
        def stepping(*arguments: Any, **named: Any) -> Any:
            if "checkpoints" in str(arguments[0]) or isinstance(arguments[0], int):
                step()
            return function(*arguments, **named)

        return stepping

    os.replace, os.fsync, os.unlink = before(os.replace), before(os.fsync), before(os.unlink)
    output._PIECE = 1 << 14
    put = output.put

    def half(file: Any, piece: memoryview) -> None:
        put(file, piece[: len(piece) // 2])
        step()
        put(file, piece[len(piece) // 2 :])

    output.put = half


def _die_in(number: int) -> None:
    """SIGKILL this process at its ``number``-th moment.

    Moments are before and after a validation, each batch of it, each row of the log (written by half, too), each rewriting of the
    log, the end of training, and each step of writing the report.
    """
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
    from lightning.pytorch.loops.fit_loop import _FitLoop

    from umm_zoo.checkpoints import plain_files
    from umm_zoo.training import log
    from umm_zoo.training.run_folder import RunFolder

    done = 0

    def moment() -> None:
        nonlocal done
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def in_between(*arguments: Any, **named: Any) -> Any:
            moment()
            result = function(*arguments, **named)
            moment()
            return result

        setattr(owner, name, in_between)

    for name in ("run", "_evaluation_step", "on_run_end"):
        around(_EvaluationLoop, name)
    around(_FitLoop, "on_run_end")
    around(log.MetricsLog, "log_metrics")
    around(log.MetricsLog, "rewind")
    around(RunFolder, "finish")
    around(RunFolder, "begin")
    around(plain_files, "sync")

    open_log = log.MetricsLog._open

    def halving(self: Any) -> None:
        open_log(self)
        if type(self._stream) is not _Halving:
            self._stream = _Halving(self._stream, moment)

    log.MetricsLog._open = halving  # type: ignore[method-assign]


class _Halving:
    """Stream that writes every text in two halves, with a moment in between."""

    def __init__(self, stream: Any, moment: Any) -> None:
        self.stream, self.moment = stream, moment

    def write(self, text: str) -> None:
        self.stream.write(text[: len(text) // 2])
        self.stream.flush()
        self.moment()
        self.stream.write(text[len(text) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _live(order: dict[str, Any]) -> int:
    import resource

    os.chdir(order["folder"])
    os.environ |= order["environment"]
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], resource.RLIM_INFINITY))
    if order["kill_at"]:
        _die_at(order["kill_at"])
    if order["kill_in"]:
        _die_in(order["kill_in"])
    from umm_zoo.fit import main

    try:
        return main(order["argv"])
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1


def main() -> None:
    """Obey."""
    import chain_parts  # noqa: F401 - imported once, for all
    import torch

    import umm_zoo.training.run  # noqa: F401

    for module in sys.argv[1:]:
        importlib.import_module(module)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    answers.write("0\n")
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            status = os.waitpid(order["wait"], 0)[1]
            answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _live(order)
            finally:
                sys.stdout.flush()
                os._exit(code)
        answers.write(f"{pid}\n")


if __name__ == "__main__":
    main()
