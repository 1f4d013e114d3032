"""Writing a checkpoint so that it is whole or not there, and reading one without unpickling objects."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from torch import Tensor

from umm_zoo.checkpoints.folder import INDEX, PARTIAL, checkpoint_path, damage, remove, sync
from umm_zoo.checkpoints.sharded import read_rest, read_sharded
from umm_zoo.errors import UserError

#: Errors that mean: no room. EFBIG is a limit on the size of files, as some clusters set.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under a temporary name, reads back, flushes, renames: a checkpoint under its own name is always a whole one.

    Every strategy writes single files through this plug-in; the sharded one does the same for its folders.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            UserError: it could not be written, or not be read back; what was written is removed again.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        partial = path.with_name(path.name + PARTIAL)
        output: _Output | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _Output(partial) as output:
                torch.save(checkpoint, cast(IO[bytes], output))
            verify(partial, checkpoint)
            os.replace(partial, path)
            sync(path.parent)
        except Exception as error:  # pickling may fail in any way, and torch hides what the disk said behind its own error
            cause = (output.error if output else None) or error
            remove(partial)
            raise UserError("checkpoint", f"{path} could not be written: {reason(cause)}") from cause

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint after its checksums; a sharded one is put together.

        Raises:
            UserError: there is none, or a damaged one.
        """
        if Path(path).exists() and (problem := damage(Path(path))):
            raise UserError(path, f"a damaged checkpoint ({problem})", "an intact one")
        return load_checkpoint(path)


class _Output:
    """A file for ``torch.save`` that remembers the first error of the disk: torch would report another one in its place."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._stream = path.open("wb")

    def __enter__(self) -> _Output:
        return self

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._stream.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as failed:
            self.error = self.error or failed
            if error is None:
                raise
        finally:
            try:
                self._stream.close()
            except OSError as failed:  # what could not be flushed before cannot be now
                self.error = self.error or failed


def reason(error: BaseException) -> str:
    """An error as part of one line."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"no room on the disk ({error.strerror})"
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"


def verify(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Read ``path`` back and compare it with what was to be written.

    Raises:
        ValueError: a checksum is wrong, or keys, shapes or types of the weights differ.
    """
    if problem := damage(path):
        raise ValueError(problem)
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if found.keys() != checkpoint.keys():
        raise ValueError(f"keys {sorted(found.keys() ^ checkpoint.keys())} are missing or too many")
    if _outline(found.get("state_dict", {})) != _outline(checkpoint.get("state_dict", {})):
        raise ValueError("the weights read back are not those written")


def _outline(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None for key, value in state.items()}


def load_checkpoint(source: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Read the checkpoint of a run folder, a checkpoint (file or sharded folder), or consolidated weights (``.safetensors``).

    Nothing is unpickled but plain values and tensors (``weights_only``).

    Args:
        source: what to read.
        mapped: leave the tensors on the disk until they are touched.

    Raises:
        UserError: there is no checkpoint, or something else, or one that is cut short.
    """
    path = checkpoint_path(source)
    try:
        if path.is_dir():
            return dict(read_sharded(path))
        if path.suffix == ".safetensors":
            return _read_consolidated(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what a reader of pickles stumbles over in a foreign file is of any class
        why = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        expected = "a run folder or a checkpoint that umm_zoo.fit has written"
        raise UserError(path, f"a file that cannot be read as a checkpoint ({why})", expected) from error
    return checkpoint


def step_in(source: str | Path) -> int:
    """Optimiser steps that a checkpoint holds; its tensors are not read.

    Raises:
        UserError: there is no checkpoint, or something else, or one that is cut short.
    """
    path = checkpoint_path(source)
    return int((read_rest(path) if path.is_dir() else load_checkpoint(path, mapped=True))["global_step"])


#: What a consolidated file holds beside the weights, as JSON in its header.
DESCRIPTION = ("experiment", "folders", "left_behind", "global_step")


def _read_consolidated(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:
        description = json.loads((file.metadata() or {}).get("umm_zoo", "null"))
        if description is None:
            raise SafetensorError("not written by tools/consolidate.py")
        return {**description, "state_dict": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118 - not a dict


__all__ = ["DESCRIPTION", "INDEX", "NO_ROOM", "AtomicCheckpointIO", "load_checkpoint", "reason", "step_in", "verify"]
