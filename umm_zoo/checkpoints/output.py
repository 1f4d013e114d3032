"""Output of ``torch.save`` whose errors are those of the disk: torch reports another in their place."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch

#: Errors that mean: no space left. EFBIG is a limit on the size of files, as some clusters set.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(value: Any, path: Path) -> None:
    """Write ``value`` as ``torch.save`` does and flush it to the disk; raises what the disk has said."""
    output = _Output(path)
    try:
        with output:
            torch.save(value, cast(IO[bytes], output))
    except Exception as error:
        raise (output.error or error) from error


def reason(error: BaseException) -> str:
    """An error as part of one line."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"no room on the disk ({error.strerror})"
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"


class _Output:
    """File that remembers the first error of the disk."""

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
