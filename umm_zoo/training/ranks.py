"""The processes of a run. An error among several ranks ends them all within seconds, and rank 0 says it, once.

A rank that meets an error writes it into a small folder beside the run folders, which every rank looks for a few times a second, in
a thread of its own: the others may be blocked in a collective that will never end. Nothing here imports torch.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from umm_zoo.checkpoints.background import wait_for_writers
from umm_zoo.errors import UserError, print_error
from umm_zoo.experiment.limits import too_many_processes

if TYPE_CHECKING:
    from lightning import Trainer

#: Variables that tell one launch of ranks from another, by what launches them: torchrun, SLURM's srun, Lightning itself.
_LAUNCHES = (
    ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    ("SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ("MASTER_ADDR", "MASTER_PORT"),
)
_POLL, _PATIENCE = 0.25, 30.0  # seconds between two looks, and until the others are no longer waited for
_GRACE = 15.0  # seconds that a rank whose connection breaks gives another one to say why
_OLD = 60.0  # seconds before its own start from which on a process thinks an error one of an earlier launch
_STARTED = time.time()


def is_main_process() -> bool:
    """Whether this is the process that writes, before a trainer exists to ask."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def launched_ranks() -> int:
    """Number of processes that a launcher has started with this one; 1 where Lightning may still start others itself."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1) if _launch_names() else 1


def _launch_names() -> tuple[str, ...]:
    return next((names for names in _LAUNCHES if names[0] in os.environ), ())


class _Rank:
    """This process among the others of its launch.

    Args:
        folder: that of the run folders, which every rank can reach.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.is_main = folder.absolute(), launched_ranks(), is_main_process()
        self.launcher: Any = None  # where it is Lightning's own, its processes are ranks that it has started from here
        self._ending = threading.Lock()
        self._left = threading.Event()
        self._watcher: threading.Thread | None = None

    def watch(self) -> None:
        """From now on end this process when another rank has met an error."""
        if self.count > 1 and self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
            self._watcher.start()

    def leave(self) -> None:
        """Watch no longer."""
        self._left.set()

    def _watch(self) -> None:
        while not self._left.wait(_POLL):
            if self._posted():
                with self._ending:
                    self._follow()

    def meet(self, error: Exception, show_traceback: bool) -> None:
        """This rank has met an error: end it, and with it all others. Returns only where they cannot be told."""
        with self._ending:
            self._left.set()
            if not isinstance(error, UserError) and _may_come_from_another(error):
                _wait_until(self._posted, _GRACE)
            try:
                first = self._post(error)
            except OSError:
                return
            if first and (show_traceback or not isinstance(error, UserError)):
                traceback.print_exception(error)
            self._follow()  # where another was first, this error may be a mere consequence, such as a closed connection

    def _follow(self) -> NoReturn:
        """End as the error that was posted demands; the main thread may be blocked for good."""
        _wait_until((self._place / "error").exists)
        try:
            text = (self._place / "error").read_text(encoding="utf-8")
        except OSError:
            text = ""
        if not self.is_main:  # rank 0 speaks first: a launcher that sees one rank end stops the others
            _wait_until((self._place / "said").exists)
        if text and (self.is_main or not (self._place / "said").exists()):
            print_error(UserError(message=text))
        self._see_the_others_off()
        sys.stdout.flush()
        sys.stderr.flush()
        wait_for_writers()
        for leave in before_exit:
            leave()
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(2 if text else 1)

    def _see_the_others_off(self) -> None:
        """Leave a sign of having seen the error; rank 0 waits until every rank has. The last one removes the folder."""
        watched: list[subprocess.Popen[bytes]] = getattr(self.launcher, "procs", [])
        procs, watched[:] = list(watched), []  # Lightning's observer would kill this process as soon as one of them ends
        with suppress(OSError):
            (self._place / ("said" if self.is_main else f"seen-{os.uname().nodename}-{os.getpid()}")).touch()
            if len(list(self._place.glob("s*"))) >= self.count:
                shutil.rmtree(self._place)
        if self.is_main:
            _wait_until(lambda: not self._place.exists() or bool(procs and all(process.poll() is not None for process in procs)))
        for process in procs:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()

    # -- the folder in which they meet ---------------------------------------------------------------------------------------

    @property
    def _place(self) -> Path:
        told = "-".join(os.environ.get(name, "") for name in _launch_names())
        return self.folder / (".error-" + re.sub(r"[^\w.-]+", "-", told))

    def _posted(self) -> bool:
        try:  # what an earlier launch of the same address has left behind is none of ours
            return (self._place / "error").stat().st_mtime > _STARTED - _OLD
        except OSError:
            return False

    def _post(self, error: Exception) -> bool:
        """Say to the others that they must end; False where another rank has been quicker."""
        place = self._place
        if place.is_dir() and place.stat().st_mtime < _STARTED - _OLD:
            shutil.rmtree(place, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            place.mkdir()
        except FileExistsError:
            return False
        (place / "partial").write_text(error.to_json() if isinstance(error, UserError) else "", encoding="utf-8")
        (place / "partial").rename(place / "error")
        return True


def _may_come_from_another(error: BaseException) -> bool:
    """Whether an error was raised where ranks exchange something: another that ends takes its connections with it."""
    torch = sys.modules.get("torch")
    frames = traceback.extract_tb(error.__traceback__)
    if torch is None or not frames:
        return False
    places = [str(Path(torch.__path__[0]) / place) for place in ("distributed", "autograd", os.path.join("nn", "parallel"))]
    return frames[-1].filename.startswith(tuple(places))


def _wait_until(condition: Callable[[], bool], patience: float = _PATIENCE) -> None:
    began = time.monotonic()
    while not condition() and time.monotonic() < began + patience:
        time.sleep(_POLL / 5)


_rank: _Rank | None = None
#: What a process does before an error among several ranks ends it.
before_exit: list[Callable[[], None]] = []
#: Variable that tells a process to end with the one that has started it: a rank with rank 0, a training with its comparison.
PARENT = "UMM_ZOO_PARENT"


@contextmanager
def ending_together(folder: Path, show_traceback: bool = False) -> Iterator[None]:
    """Around a command: where several ranks run it, an error of one of them ends all.

    Args:
        folder: that of the run folders.
        show_traceback: let the rank that has met a user error show where it comes from.
    """
    global _rank
    _end_with_parent()
    _rank = rank = _Rank(folder)
    rank.watch()
    try:
        yield
    except Exception as error:
        if rank.count > 1:
            rank.meet(error, show_traceback)
        raise
    finally:
        rank.leave()
        _rank = None


def join_ranks(trainer: Trainer) -> None:
    """Tell the command around this that ``trainer`` is about to run as one of several ranks, or to start them.

    Raises:
        UserError: it would start more than the machine can bear.
    """
    if trainer.strategy.root_device.type == "cpu" and (problems := list(too_many_processes(trainer.num_devices))):
        raise UserError("", problems)
    if _rank is not None:
        _rank.count, _rank.is_main, _rank.launcher = trainer.world_size, trainer.is_global_zero, trainer.strategy.launcher
        _rank.watch()
    if trainer.world_size > 1 and trainer.strategy.launcher is not None:
        os.environ[PARENT] = str(os.getpid())


def _end_with_parent() -> None:
    """Where the process that has started this one said so, end with it, whatever has ended it."""
    parent = int(os.environ.pop(PARENT, "0"))
    if parent and parent != os.getpid():
        threading.Thread(target=_watch_parent, args=(parent, is_main_process()), name="parent", daemon=True).start()


def _watch_parent(parent: int, saves: bool) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
    os.kill(os.getpid(), signal.SIGTERM if saves else signal.SIGKILL)


# -- signals, and children that get them too -----------------------------------------------------------------------------------


@contextmanager
def answering(numbers: Collection[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """``handler`` for these signals inside; only the main thread can set handlers, so elsewhere nothing happens."""
    numbers = numbers if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def leave(signum: int, frame: FrameType | None) -> None:
    """Handler until Lightning and ``StopOnSignal`` have theirs: by default SIGTERM would end this process and orphan its ranks."""
    raise SystemExit(128 + signum)


def call(command: Sequence[str]) -> int:
    """Exit code of a child that gets the signals which ask this process to stop; Ctrl-C reaches it by itself."""
    child = subprocess.Popen(command, env={**os.environ, PARENT: str(os.getpid())})
    with answering((signal.SIGTERM, signal.SIGUSR1), lambda signum, _: child.send_signal(signum)):
        return child.wait()
