"""The process of a nursery: it has imported the libraries, makes no thread and no generator, and forks itself for each command.

A child is a fresh interpreter in everything but its imports: arguments, environment, folder, ``sys.path``, streams, session and
signals are those it was asked for, ``__main__`` is the module that is run, and it ends through Python's own exit functions.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

#: Variables that libraries read when they are imported: a command with others than these is for a fresh interpreter.
AT_IMPORT = ("OMP_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "DIFFUSERS_", "CUDA_", "PYTHONHASH", "PYTHONWARN", "XDG_", "HOME")
#: What commands import, some of it only when they need it.
MODULES = (
    *("chain_parts", "exact_parts", "rollout_parts", "nursery_kills"),
    *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.PpmImagePlugin"),
    *("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", "torch.distributed.run", "torch.utils.tensorboard"),
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2"),
    *("data_pipelines.caption_tasks", "data_pipelines.shards.data", "data_pipelines.shards.streaming"),
    *("umm_zoo.backbones.janus", "umm_zoo.backbones.patch_codebook", "umm_zoo.methods.janus"),
    *("umm_zoo.comparison.plan", "umm_zoo.comparison.results", "umm_zoo.comparison.run"),
    *("umm_zoo.shapes.caption_metrics", "umm_zoo.shapes.geneval_metrics"),
    *("umm_zoo.training.curriculum", "umm_zoo.training.ema", "umm_zoo.training.run", "umm_zoo.training.sharding"),
)


class Server:
    """Commands that run, and the connections of those who wait for them.

    Args:
        python: the program that stands in for Python in the children.
    """

    def __init__(self, place: str, python: str) -> None:
        self.python, self.running = python, dict[int, socket.socket]()
        self.at_import = _at_import(os.environ)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(place)
        self.listener.listen(64)
        self.wakes, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Until the tests' process closes the pipe to this one, or ends."""
        while True:
            readable = select.select([0, self.wakes, self.listener, *self.running.values()], [], [])[0]
            if self.wakes in readable:
                os.read(self.wakes, 4096)
                self._reap()
            for pid in [pid for pid, connection in self.running.items() if connection in readable]:
                os.kill(pid, signal.SIGKILL)  # whoever waited for it was killed
                self.running.pop(pid).close()
            if self.listener in readable:
                self._begin(self.listener.accept()[0])
            if 0 in readable and not os.read(0, 1):
                for pid in self.running:
                    os.kill(pid, signal.SIGKILL)
                return

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if connection := self.running.pop(pid, None):
                _tell(connection, os.waitstatus_to_exitcode(status))
                connection.close()

    def _begin(self, connection: socket.socket) -> None:
        content, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        while content and not content.endswith(b"\n"):
            content += connection.recv(1 << 16)
        order = json.loads(content or '{"argv": [], "environment": {}}')
        if order["argv"][:1] == ["-u"]:  # what is written is never held back here
            del order["argv"][0]
        if _at_import(order["environment"]) != self.at_import or order["argv"][:1] not in (["-m"], ["-c"]):
            _tell(connection, 0)
            connection.close()
        elif pid := os.fork():
            self.running[pid] = connection
            _tell(connection, pid)
        else:
            self._become(order, connection, streams)
        for stream in streams:
            os.close(stream)

    def _become(self, order: dict[str, Any], connection: socket.socket, streams: list[int]) -> None:
        """This process, a child, is the command from here on."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            for mine in (self.listener, connection, *self.running.values()):
                mine.close()
            os.close(self.wakes)
            sys.executable = self.python
            code = _run(order)
        finally:
            os._exit(code)


class _Unseekable(io.FileIO):
    """As which of its files, pipes and terminals a child's stream will be is not known yet."""

    def seekable(self) -> bool:
        return False


def _stream(number: int, errors: str) -> io.TextIOWrapper:
    raw = _Unseekable(number, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors=errors, write_through=True)  # type: ignore[arg-type]  # as python -u does


def _tell(connection: socket.socket, number: int) -> None:
    with suppress(OSError):  # nobody waits for it
        connection.sendall(f"{number}\n".encode())


def _at_import(environment: Any) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(AT_IMPORT)}


def _run(order: dict[str, Any]) -> int:
    """Run the command as ``python -m`` or ``python -c`` does, to its very end; returns the exit code."""
    import atexit
    import threading
    import time
    import traceback

    import numpy as np

    from umm_zoo.training import ranks

    places = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    kind, what, *argv = order["argv"]
    own = [os.getcwd() if kind == "-m" else "", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = own + [place for place in sys.path[1:] if place not in places]
    sys.argv = [kind, *argv]
    np.random.seed()  # Python's own is drawn again at each fork
    ranks._STARTED = time.time()
    os.getppid = lambda: _parent_of(order["asks"])
    _prepare(**order.get("kills", {}))
    try:
        code = _exit_code(kind, what)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _exit_code(kind: str, what: str) -> int:
    import runpy
    import traceback
    import types

    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = module = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), module.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return int(end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    except KeyboardInterrupt:
        raise
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _parent_of(pid: int) -> int:
    """That of the process which asked for this one and stands for it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stream:
            return int(stream.read().rpartition(")")[2].split()[1])
    except OSError:
        return 1


def _prepare(kill_at: int | None = None, kill_in: int | None = None, largest_file: int | None = None) -> None:
    import resource

    import nursery_kills

    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if kill_at:
        nursery_kills.die_at(kill_at)
    if kill_in:
        nursery_kills.die_in(kill_in)


def main(place: str, python: str) -> None:
    """Import, say so, and serve."""
    sys.stdout = sys.__stdout__ = _stream(1, "strict")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, "backslashreplace")  # type: ignore[misc]
    gc.disable()
    for module in MODULES:
        importlib.import_module(module)
    import torch

    from umm_zoo.experiment.sources import commit_of_package

    torch.set_num_threads(1)
    commit_of_package()  # one git for all children
    gc.freeze()  # a pass over what the imports made takes a third of a second, and copies its pages in every child
    gc.enable()
    server = Server(place, python)
    os.write(1, b"0\n")
    server.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
