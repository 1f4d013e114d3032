"""Output of ``torch.save`` whose errors are those of the disk: torch reports another in their place."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import torch

#: Errors that mean: no space left. EFBIG is a limit on the size of files, as some clusters set.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(value: Any, path: Path) -> None:
    """Write ``value`` as ``torch.save`` does and flush it to the disk; raises what the disk has said."""
    file = _File(io.FileIO(path, "w"))
    try:
        with file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        raise (file.error or error) from error


def reason(error: BaseException) -> str:
    """An error as part of one line."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"no room on the disk ({error.strerror})"
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"


class _File(io.BufferedWriter):
    """File that remembers the first error of the disk."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise
