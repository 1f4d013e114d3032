"""SIGKILL from within, at a step of writing a checkpoint or at a moment around validations, the log and the report."""

from __future__ import annotations

import os
import signal
from typing import Any


def die_at(number: int) -> None:
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


def die_in(number: int) -> None:
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
