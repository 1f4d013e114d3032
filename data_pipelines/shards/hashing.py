"""Checksums of whole shards."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from data_pipelines.shards.progress import bytes_bar

#: Seconds of hashing without a word.
PATIENCE = 2.0


def content_of(path: str | Path, advance: Callable[[int], None] | None = None) -> str:
    """The sha256 of a local file; ``advance`` is told of the bytes done, or a bar where that takes more than `PATIENCE` seconds."""
    digest, began, size = hashlib.sha256(), time.monotonic(), os.path.getsize(path)
    with open(path, "rb") as stream, ExitStack() as stack:
        while piece := stream.read(1 << 22):
            digest.update(piece)
            if advance is None and time.monotonic() - began > PATIENCE:
                advance = stack.enter_context(bytes_bar(f"content of {os.path.basename(path)}", size, stream.tell()))
            elif advance is not None:
                advance(len(piece))
    return digest.hexdigest()
