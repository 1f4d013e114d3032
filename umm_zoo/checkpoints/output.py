"""What ``torch.save`` makes, in memory first: to write it needs no more than the disk, and a thread can while training goes on."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

#: Errors that mean: no space left. EFBIG is a limit on the size of files, as some clusters set.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Bytes that are written in one go.
_PIECE = 1 << 22


def in_memory(value: Any) -> memoryview:
    """The file that ``torch.save`` would write."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()


def write(contents: Iterable[memoryview], path: Path) -> None:
    """Write a file, one content behind the other, and flush it to the disk; raises what the disk has said."""
    with path.open("wb", buffering=0) as file:
        for content in contents:
            for first in range(0, len(content), _PIECE):
                put(file, content[first : first + _PIECE])
        os.fsync(file.fileno())


def put(file: BinaryIO, piece: memoryview) -> None:
    """Write a piece, however many calls the system takes for it."""
    while len(piece):
        piece = piece[file.write(piece) :]


def reason(error: BaseException) -> str:
    """An error as part of one line."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"no room on the disk ({error.strerror})"
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
