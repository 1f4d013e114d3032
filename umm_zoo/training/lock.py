"""Lock of a run folder: two processes that trained in one folder would ruin its log and each other's checkpoints.

The file ``lock`` says who holds it. It is made in one go, on a network's file system too, and its holder touches it now and then.
One whose holder has ended, or has not touched it for a while on another machine, is taken over. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from umm_zoo.errors import UserError, note, print_error
from umm_zoo.training.ranks import before_exit

NAME = "lock"
BEAT = 5.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which a holder on another machine is thought dead


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    Args:
        host: its machine.
        space: of process numbers on it (a container has its own), with the machine's last start.
        pid: its number there.
        began: when it started, by the machine's own count: numbers are used again.
        token: this very holding.
    """

    host: str
    space: str
    pid: int
    began: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def this(cls) -> Holder:
        """The process that runs this."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Holder:
        """A process of this machine, by its number."""
        return cls(socket.gethostname(), _space(), pid, _began(pid), uuid.uuid4().hex)

    def ended(self) -> bool | None:
        """Whether the process is no more; None where that cannot be seen from here."""
        if (self.host, self.space) != (socket.gethostname(), _space()):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _began(self.pid) != self.began


def _space() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _began(pid: int) -> str:
    """When a process started, as the system counts it; empty where it has ended (and waits for its parent) or nothing is known."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder; where the folder does not exist, it is made, and removed again if nothing else came into it.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _Lock(folder / NAME)
    lock.take()
    before_exit.append(lock.leave)
    beating = threading.Thread(target=lock.beat, name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        lock.leave()
        before_exit.remove(lock.leave)
        with suppress(OSError):
            folder.rmdir()


def in_progress(folder: Path) -> bool:
    """Whether a process holds the lock of a run folder, as far as can be seen from here."""
    found = _read(folder / NAME)
    return found is not None and found.ended() is not True


class _Lock:
    def __init__(self, file: Path) -> None:
        self.file, self.own = file, Holder.this()
        self._left = threading.Event()

    def take(self) -> None:
        while not self._create(self.file):
            found = _read(self.file)
            age = self._age(self.file)
            if age is None:
                continue  # it has been given back meanwhile
            if found is None and age < BEAT:  # made, and not yet written
                time.sleep(0.1)
                continue
            ended = None if found is None else found.ended()
            if ended is False or (ended is None and age < STALE):
                expected = "a folder in which nothing is trained"
                if found is None:  # damaged, or of another version
                    what = f"a run in progress: its file '{NAME}', touched {age:.0f} s ago, does not say whose it is"
                    hint = f"start again in {STALE - age:.0f} s: if nobody touches it, it is taken over (or name=… for another one)"
                    raise UserError(self.file.parent, what, expected, hint)
                hint = "name=… for another one, or wait for its end"
                raise UserError(
                    self.file.parent, f"a run in progress ({found}, {age:.0f} s ago by the file '{NAME}')", expected, hint
                )
            self._take_over(found, age)

    def _take_over(self, stale: Holder | None, age: float) -> None:
        """Remove a stale lock; of several processes that try, one does, and no fresh lock is ever removed."""
        guard = self.file.with_name(f"{NAME}-taking-over")
        if not self._create(guard):
            if (self._age(guard) or 0) > STALE:
                guard.unlink(missing_ok=True)
            time.sleep(0.1)
            return
        try:
            if _read(self.file) == stale:
                self.file.unlink(missing_ok=True)
                who = f"of {stale}, which has ended" if stale and stale.ended() else f"without a sign of life for {age:.0f} s"
                note(f"{self.file.parent}: took over the lock {who}")
        finally:
            guard.unlink(missing_ok=True)

    def _create(self, file: Path) -> bool:
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(self.own)))
        return True

    def _age(self, file: Path) -> float | None:
        """Seconds since the last sign of life, by the clock of the disk: those of two machines differ."""
        now = self.file.with_name(f"{NAME}-{self.own.token}")
        try:
            now.touch()
            return now.stat().st_mtime - file.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            now.unlink(missing_ok=True)

    def beat(self) -> None:
        """Touch it from time to time; end this process where another has taken it over (this one was stopped for a long time)."""
        while not self._left.wait(BEAT):
            with suppress(OSError):
                found = _read(self.file)
                if found is not None and found.token != self.own.token:
                    print_error(UserError(self.file.parent, f"this run was taken for dead, and {found} has taken its folder over"))
                    os._exit(2)
                os.utime(self.file)

    def leave(self) -> None:
        self._left.set()
        with suppress(OSError):
            if _read(self.file) == self.own:
                self.file.unlink()


def _read(file: Path) -> Holder | None:
    try:
        return Holder(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
