"""Cache of whole remote shards in a bounded folder, shared by all processes of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.shards.addresses import shown
from data_pipelines.shards.hashing import content_of
from data_pipelines.shards.indexing import stale_index
from data_pipelines.shards.remote import fetch, state
from umm_zoo.errors import UserError

log = logging.getLogger(__name__)

#: Names of files that a cache has made.
_OWN_NAME = re.compile(r"[0-9a-f]{32}(\.tar|\.[0-9]+\.partial)")


class ShardCache:
    """Folder in which remote shards are kept; those used longest ago make space.

    A shard is fetched under another name, its space taken beforehand, and renamed when it is whole, so neither a reader nor a crash
    meets half a shard and the folder never exceeds its bound. Where there is no space (a shard larger than the bound, or all of it
    being fetched into by others) the caller reads ranges from afar.
    The folder must lie on a local disk (file locks).
    """

    def __init__(self, folder: str | Path, gigabytes: float) -> None:
        if gigabytes <= 0:
            raise UserError("data.cache_gb", str(gigabytes), "a positive number")
        self.folder, self.bound = Path(folder), int(gigabytes * 1e9)
        self._refused: set[str] = set()

    def read(self, path: str, offset: int, length: int, tag: str = "", sha256: str = "") -> bytes | None:
        """A byte range of a remote shard, which is fetched first if need be; None where there is no space for it.

        ``tag`` is the version that the server names, ``sha256`` the content that the index was made for: another version of the
        same address is fetched again, and refused where it is not of that content.
        """
        version = f"{path}\n{tag}\n{sha256}"
        place = self.folder / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}.tar"
        for _ in range(3):
            try:
                # opened again each time: a file held open would take space after its eviction
                with open(place, "rb", buffering=0) as file:
                    os.utime(file.fileno())  # those used longest ago go first
                    return os.pread(file.fileno(), length, offset)
            except FileNotFoundError:
                if not self._fetch(path, place, sha256):
                    return None
        return None  # others evict it faster than it can be opened: the cache is too small for all who use it

    def _fetch(self, path: str, place: Path, sha256: str) -> bool:
        """Whether the shard is there now."""
        if path in self._refused:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(place.with_suffix(".lock")):
            if place.exists():  # another process has fetched it while this one waited
                return True
            size = state(path).size
            partial = place.with_suffix(f".{size}.partial")
            if not self._reserve(partial, size):
                if size > self.bound:
                    self._refused.add(path)
                    log.warning("%s: its %d bytes exceed data.cache_gb; it is read by ranges", shown(path), size)
                return False
            try:
                fetch(path, partial)
                if sha256 and content_of(partial) != sha256:
                    raise stale_index(shown(path), shown(path), f"its content is not what its index was made for (sha256 {sha256})")
                with _locked(self.folder / ".lock"):
                    os.replace(partial, place)
            finally:
                partial.unlink(missing_ok=True)
        return True

    def _reserve(self, partial: Path, size: int) -> bool:
        """Make space by evicting, and take it: a partial file counts with the size in its name."""
        with _locked(self.folder / ".lock"):
            files = sorted(self._files())
            held = sum(other for _, other, file in files if file != partial)
            for _, other, file in files:
                if held + size <= self.bound:
                    break
                if file != partial and (file.suffix == ".tar" or _abandoned(file)):
                    file.unlink(missing_ok=True)
                    held -= other
            if held + size > self.bound:
                return False
            partial.touch()
            return True

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, size, file) of every shard, whole or being fetched."""
        found = []
        for file in self.folder.glob("*.*"):
            if _OWN_NAME.fullmatch(file.name):  # what else lies in the folder is somebody's
                try:
                    state = file.stat()
                except FileNotFoundError:  # evicted or renamed by another process
                    continue
                size = int(file.name.split(".")[1]) if file.suffix == ".partial" else state.st_size
                found.append((state.st_mtime, size, file))
        return found


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _abandoned(partial: Path) -> bool:
    """Whether the process that fetched into this file is gone."""
    with open(partial.with_name(partial.name.split(".")[0] + ".lock"), "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
