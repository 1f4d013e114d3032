"""Random access to plain tar shards through their indexes, local or remote.

A shard is read with range reads alone: nothing is extracted, so a member's name can never become a path, and no shard can start a
program (``pipe:`` addresses of webdataset are refused).
"""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from typing import Any

from data_pipelines.shards.addresses import filesystem, is_remote
from data_pipelines.shards.cache import ShardCache
from data_pipelines.shards.index import ShardIndex
from data_pipelines.shards.indexing import stale_index

_MAX_OPEN = 64
_BLOCK = 512
#: Members of one sample lie side by side; they are fetched in one read unless more than this many bytes of others lie between.
_MAX_GAP = 1 << 16


class RangeReader:
    """Reader of byte ranges, with the files used last kept open; whole remote shards lie in a ``cache``."""

    def __init__(self, cache: ShardCache | None = None) -> None:
        self.cache = cache
        self._open: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return RangeReader, (self.cache,)  # another process opens its own files

    def read(self, path: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on; fewer only where the file ends."""
        if is_remote(path):
            if self.cache is not None and (kept := self.cache.read(path, offset, length)) is not None:
                return kept
            content: bytes = filesystem(path).cat_file(path, start=offset, end=offset + length)
            return content
        return os.pread(self._descriptor(path), length, offset)

    def members(self, index: ShardIndex, sample: int) -> dict[str, bytes]:
        """All members of a sample by name; a ``UserError`` where the tar does not hold there what its index says."""
        wanted = index.members(sample)
        if not wanted:
            return {}
        first = min(offset for _, offset, _ in wanted) - _BLOCK  # the tar header in front is read along, to check the index
        last = max(offset + length for _, offset, length in wanted)
        near = last - first <= sum(length + 3 * _BLOCK for _, _, length in wanted) + _MAX_GAP
        whole = self.read(index.path, first, last - first) if near else b""
        content: dict[str, bytes] = {}
        for name, offset, length in wanted:
            start = offset - _BLOCK
            span = whole[start - first : offset - first + length] if near else self.read(index.path, start, length + _BLOCK)
            content[name] = span[_BLOCK : _BLOCK + length]
            if len(content[name]) != length or _stated_size(span[:_BLOCK]) != length:
                found = f"the tar holds no member '{index.key(sample)}.{name}' of {length} bytes where its index says"
                raise stale_index(index.path, index.path, f"{found}; the file changed or was cut short")
        return content

    def _descriptor(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        self._open[path] = os.open(path, os.O_RDONLY)
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return self._open[path]

    def __del__(self) -> None:
        for descriptor in self._open.values():  # a forked process has copies of them, and closes its own
            os.close(descriptor)


def _stated_size(header: bytes) -> int:
    """The size that a tar header states; -1 where it is none."""
    try:
        return tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape").size
    except tarfile.HeaderError:
        return -1
