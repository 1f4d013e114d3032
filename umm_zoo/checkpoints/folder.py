"""Folder of a run's checkpoints: which one is the latest, whether it is intact, and how a new one takes its place.

A checkpoint is written under a temporary name, read back, flushed to the disk and renamed; then the marker ``LATEST`` changes; then
older checkpoints are removed. Whatever kills a run, and whenever, ``LATEST`` names a whole checkpoint. Nothing here imports torch:
commands look into run folders before they load it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from umm_zoo.checkpoints.seals import damage_of_archive, damage_of_safetensors
from umm_zoo.errors import UserError, note

#: The marker: names of checkpoints, newest first, one per line.
LATEST = "LATEST"
#: What ends the name of a checkpoint that is being written or removed.
PARTIAL = ".partial"
#: The table of contents of a sharded checkpoint, which is a folder.
INDEX = "index.json"
#: That of an exported method, see ``checkpoints.exported``.
CONTENTS = "model_index.json"


class CheckpointFolder:
    """``<run>/checkpoints/``: some ``step-<n>.ckpt`` (a file, or a folder where the strategy shards), and ``LATEST``.

    ``keep`` checkpoints stay, the newest included: more than one, for disks do lose what they were given.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep: found {keep}, expected 1 or more")
        self.path, self.keep = Path(path), keep

    def names(self) -> list[str]:
        """Every checkpoint in the order in which they are tried: those that ``LATEST`` lists, then other steps, then the rest."""
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if path.suffix == ".ckpt"]
        found.sort(key=lambda path: (step_of(path.name), path.stat().st_mtime), reverse=True)
        listed = [name for name in self._listed() if (self.path / name).exists()]
        return listed + [path.name for path in found if path.name not in listed]

    def newest(self) -> Path | None:
        """The checkpoint that ``LATEST`` names, without a look inside; None where there is none at all."""
        names = self.names()
        return self.path / names[0] if names else None

    def latest(self) -> Path | None:
        """The newest intact checkpoint, None where there is none at all; a note on stderr says what had to be passed over.

        Where there are checkpoints and none of them is intact, it is a ``UserError``.
        """
        passed = []
        listed = self._listed()
        if (self.path / LATEST).is_file() and not listed:
            passed.append(f"{self.path / LATEST} is damaged")
        if listed and not (self.path / listed[0]).exists():
            passed.append(f"{self.path / listed[0]} is missing")
        names = self.names()
        for name in names:
            problem = damage(self.path / name)
            if problem is None:
                if passed:
                    note(f"{'; '.join(passed)}; taking {self.path / name}")
                return self.path / name
            passed.append(f"{self.path / name} is damaged ({problem})")
        if names:
            raise UserError(self.path.parent, f"found no intact checkpoint: {'; '.join(passed)}")
        return None

    def _listed(self) -> list[str]:
        marker = self.path / LATEST
        text = marker.read_text(encoding="utf-8", errors="replace") if marker.is_file() else ""
        lines = text.splitlines()
        whole = all(re.fullmatch(r"[\w.-]+\.ckpt", line) for line in lines) and len({*lines}) == len(lines)
        return lines if whole else []

    def free(self, step: int) -> Path:
        """The path for a step: a file of this name is replaced in one go; a folder cannot be, so another name is found."""
        path, number = self.path / f"step-{step:08d}.ckpt", 1
        while path.is_dir():
            number += 1
            path = self.path / f"step-{step:08d}-{number}.ckpt"
        return path

    def wait(self, patience: float) -> None:
        """Return when another process no longer writes a checkpoint here, after ``patience`` seconds at the latest."""
        end = time.monotonic() + patience
        while any(self.path.glob(f"*{PARTIAL}")) and time.monotonic() < end:
            time.sleep(0.05)

    def publish(self, path: Path) -> None:
        """Let ``LATEST`` name a checkpoint that has been written and verified, and remove what is no longer needed.

        Checkpoints of later steps are no longer listed: the run has gone back and takes another way.
        """
        earlier = [name for name in self._listed() if name != path.name and step_of(name) <= step_of(path.name)]
        kept = [path.name, *(name for name in earlier if (self.path / name).exists())][: self.keep]
        marker, partial = self.path / LATEST, self.path / (LATEST + PARTIAL)
        with partial.open("w", encoding="utf-8") as stream:
            stream.write("".join(f"{name}\n" for name in kept))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, marker)
        sync(self.path)
        for other in [*self.path.glob("step-*.ckpt"), *self.path.glob(f"*{PARTIAL}")]:
            if other.name not in kept:
                remove(other)


def step_of(name: str) -> int:
    """The optimiser step in the name of a checkpoint, -1 where there is none."""
    match = re.match(r"step-(\d+)", name)
    return int(match[1]) if match else -1


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder first gets the name of something unfinished, for it does not go in one go."""
    if path.is_dir():
        doomed = path if path.name.endswith(PARTIAL) else path.with_name(path.name + PARTIAL)
        if doomed != path:
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Flush a folder's entries to the disk (where the system can), so that a rename outlives a power cut."""
    with suppress(OSError):  # some network file systems refuse
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_SEEN: dict[tuple[Any, ...], str | None] = {}
_SETTLED = 2_000_000_000  # ns


def damage(path: Path) -> str | None:
    """The fault of a checkpoint on disk, None where every byte is what was written.

    A file is sealed (see ``seals``); a folder has the checksums of its files in ``index.json``. Each is looked at once.
    """
    of_file = damage_of_safetensors if path.suffix == ".safetensors" else damage_of_archive
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = (str(path.resolve()), *states)
        if key in _SEEN:
            return _SEEN[key]
        problem = (_damage_of_folder if path.is_dir() else of_file)(path)
        if max(changed for *_, changed in states) < time.time_ns() - _SETTLED:  # a clock's tick may hide a later change
            _SEEN[key] = problem
        return problem
    except Exception as error:  # what a reader of archives stumbles over in a damaged one is of any class
        return f"cannot be read: {str(error) or type(error).__name__}"


def _damage_of_folder(path: Path) -> str | None:
    index: dict[str, Any] = json.loads((path / INDEX).read_text(encoding="utf-8"))
    if "crc32" in index and index["crc32"] != index_checksum(index):
        return f"'{INDEX}' is not what was written"
    for name, entry in index["files"].items():
        file = path / name
        if not file.is_file():
            return f"'{name}' is missing"
        if file.stat().st_size != entry["size"]:
            return f"'{name}' is cut short"
        if checksum(file) != entry["crc32"]:
            return f"'{name}' is not what was written"
    if strays := [file.name for file in path.glob("*.safetensors") if file.name not in index["files"]]:  # the reader takes all
        return f"'{strays[0]}' was not written with it"
    return None


def index_checksum(index: Mapping[str, Any]) -> int:
    """CRC-32 of the table of contents of a sharded checkpoint, which it holds itself."""
    return zlib.crc32(json.dumps([index["format"], index["files"]], sort_keys=True).encode())


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def checkpoint_path(source: str | Path) -> Path:
    """The newest intact checkpoint of a run folder (else a ``UserError``), or the checkpoint itself (a file or a folder)."""
    source = Path(source)
    if source.is_file() or (source / INDEX).is_file() or (source / CONTENTS).is_file():
        return source
    folder = source if source.name == "checkpoints" else source / "checkpoints"
    path = CheckpointFolder(folder).latest()
    if path is None:
        expected = "a run folder or a checkpoint that umm_zoo.fit has written"
        raise UserError(source, f"no checkpoint there (looked for {folder / 'step-*.ckpt'})", expected)
    return path
