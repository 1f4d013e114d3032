"""Readers of tar shards, local or remote: at random through an index, or from front to back without one.

Members are read and nothing is extracted, so a member's name can never become a path, and no shard can start a program (``pipe:``
addresses of webdataset are refused).
"""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from data_pipelines.shards.addresses import filesystem, is_remote
from data_pipelines.shards.cache import ShardCache
from data_pipelines.shards.index import ShardIndex
from data_pipelines.shards.indexing import split_member_name, stale_index

_MAX_OPEN = 64
_BLOCK = 512
#: Members of one sample lie side by side; they are fetched in one read unless more than this many bytes of others lie between.
_MAX_GAP = 1 << 16
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX")
_MAX_MEMBER = 1 << 28  # 256 MiB: no image or text is larger, and a header may claim anything


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
    """The size field of a tar header (octal digits, or base 256 for members over 8 GiB); -1 where there is none."""
    field = header[124:136]
    if len(field) == 12 and field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b"\0 "), 8)
    except ValueError:
        return -1


def read_samples(path: str, cut_too: bool = False) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of the samples of one tar in order; a TarError, OSError or ValueError where the rest cannot be read.

    Members of one sample stand side by side, as every writer of this layout puts them. The sample before a cut, of which members
    may be missing, is left out unless ``cut_too``. (webdataset's own iterator would read a member of any claimed size, a sparse one
    too, and take a tar that is cut between members for a whole one.)
    """
    key, members = "", dict[str, bytes]()
    with filesystem(path).open(path, "rb") if is_remote(path) else open(path, "rb") as file:
        watched = _Watched(file)
        try:
            with tarfile.open(fileobj=watched, mode="r|*") as tar:  # type: ignore[call-overload]  # it needs ``read`` alone
                for member in tar:
                    tar.members.clear()  # tarfile keeps every header
                    own, name = split_member_name(member.name)
                    if not own or not member.isreg() or member.issparse() or member.size > _MAX_MEMBER:
                        continue
                    if own != key:
                        if members:
                            yield key, members
                        key, members = own, {}
                    stream = tar.extractfile(member)
                    members.setdefault(name, b"" if stream is None else stream.read())
            watched.check_end()
        except (tarfile.TarError, OSError, EOFError):
            if members and cut_too:
                yield key, members
            raise
    if members:
        yield key, members


class _Watched:
    """Bytes of a tar, whose end is looked at: Python's tarfile takes an archive cut between members for a whole one."""

    def __init__(self, file: Any) -> None:
        self._file, self._head, self._tail = file, b"", b""

    def read(self, size: int = -1) -> bytes:
        """Bytes of the file."""
        content: bytes = self._file.read(size)
        self._head = self._head or content[:4]
        self._tail = (self._tail + content)[-_BLOCK:]
        return content

    def check_end(self) -> None:
        """A ``tarfile.ReadError`` for a plain tar that does not end in an empty block."""
        while self.read(1 << 20):
            pass
        if not self._head.startswith(_COMPRESSED) and (len(self._tail) < _BLOCK or self._tail.strip(b"\0")):
            raise tarfile.ReadError("the archive is cut short")
