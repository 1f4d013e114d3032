"""Readers of tar shards, local or remote: at random through an index, or from front to back without one.

Members are read and nothing is extracted, so a member's name can never become a path, and no shard can start a program (``pipe:``
addresses of webdataset are refused).
"""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from data_pipelines.shards.addresses import is_remote
from data_pipelines.shards.cache import ShardCache
from data_pipelines.shards.headers import BLOCK, MAX_ARCHIVE, members_of, open_tar, plain_size, split_member_name, stated
from data_pipelines.shards.index import ShardIndex
from data_pipelines.shards.indexing import stale_index
from data_pipelines.shards.remote import RemoteFile, read

_MAX_OPEN = 64
#: Members of one sample lie side by side; they are fetched in one read unless more than this many bytes of others lie between.
_MAX_GAP = 1 << 16
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX")
#: Extended headers are looked for so far in front of a member whose plain header has another name.
_MAX_LEAD = 64 * BLOCK
_MAX_BEYOND = 64


class RangeReader:
    """Reader of byte ranges, with the files used last kept open; whole remote shards lie in a ``cache``."""

    def __init__(self, cache: ShardCache | None = None) -> None:
        self.cache = cache
        self._open: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return RangeReader, (self.cache,)  # another process opens its own files

    def read(self, index: ShardIndex, offset: int, length: int) -> bytes:
        """``length`` bytes of a shard from ``offset`` on; fewer only where it ends."""
        if is_remote(index.path):
            cached = self.cache.read(index.path, offset, length, index.tag, index.sha256) if self.cache is not None else None
            return read(index.path, offset, offset + length, index.tag) if cached is None else cached
        return os.pread(self._descriptor(index.path), length, offset)

    def members(self, index: ShardIndex, sample: int, names: Sequence[str] | None = None) -> dict[str, bytes]:
        """The members of a sample by name, all or those of ``names``; a ``UserError`` where the tar holds something else there."""
        wanted = [place for place in index.members(sample) if names is None or place[0] in names]
        if not wanted:
            return {}
        key = index.key(sample)
        lead = max(_lead(f"{key}.{name}") for name, _, _ in wanted)  # the headers in front are read along, to check the index
        first = max(0, min(offset for _, offset, _ in wanted) - lead)
        last = max(offset + length for _, offset, length in wanted)
        near = last - first <= lead + sum(length + 3 * BLOCK for _, _, length in wanted) + _MAX_GAP
        whole = self.read(index, first, last - first) if near else b""
        content: dict[str, bytes] = {}
        for name, offset, length in wanted:
            start = max(0, offset - lead)
            end = offset + length
            span, begin = (whole, first) if near else (self.read(index, start, end - start), start)
            headers, content[name] = span[start - begin : offset - begin], span[offset - begin : end - begin]
            short = len(headers) < BLOCK or len(content[name]) < length
            if short or not self._stands(index, offset, headers, key, name, length):
                found = f"the tar holds no member '{key}.{name}' of {length} bytes where its index says"
                raise stale_index(index.path, index.path, f"{found}; the file changed or was cut short")
        return content

    def _stands(self, index: ShardIndex, offset: int, blocks: bytes, key: str, name: str, length: int) -> bool:
        """Whether the header at the end of ``blocks``, in front of ``offset``, is that of a member of this name and length."""
        header = blocks[-BLOCK:]
        if header[:100].rstrip(b"\0") == f"{key}.{name}".encode() and not header[345] and plain_size(header) == length:
            return True
        start = max(0, offset - _MAX_LEAD)
        # another spelling, or an extended header that says more
        return any(
            (split_member_name(stated_name), size) == ((key, name), length)
            for stated_name, size in (stated(read()) for read in (lambda: blocks, lambda: self.read(index, start, offset - start)))
        )

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


def _lead(name: str) -> int:
    """Bytes in front of a member's content that hold its headers: one block, or extended ones for long and foreign names."""
    return BLOCK if len(name) <= 100 and name.isascii() else BLOCK * (4 + len(name) // 128)


class Members(dict[str, bytes]):
    """Members of a sample by name; none, and the reason in ``refused``, where they cannot be used."""

    refused = ""


def read_samples(path: str) -> Iterator[tuple[str, Members]]:
    """Key and members of the samples of one tar in order; a TarError, OSError or ValueError where the rest cannot be read.

    Members of one sample stand side by side, as every writer of this layout puts them. The sample before a cut, of which members
    may be missing, is left out. What is damaged between two members is a refused sample with the key ``*``.
    (webdataset's own iterator would read a member of any claimed size, a sparse one too, and take a tar that is cut between
    members for a whole one.)
    """
    key, members = "", Members()
    with nullcontext(RemoteFile(path)) if is_remote(path) else open(path, "rb") as file:
        watched = _Watched(file)
        size = file.size if isinstance(file, RemoteFile) else os.path.getsize(path)
        for member in members_of(open_tar(watched, "r|*", MAX_ARCHIVE if watched.is_compressed else size)):
            if isinstance(member, str):
                damage = Members()
                damage.refused = member
                yield "*", damage
                continue
            if not member.key:
                continue
            if member.key != key:
                if key:
                    yield key, members
                key, members = member.key, Members()
            if member.refused and not members.refused:
                members.clear()
                members.refused = member.refused
            elif not members.refused:
                stream = member.tar.extractfile(member.header)
                members.setdefault(member.extension, b"" if stream is None else stream.read())
        watched.check_end()
    if key:
        yield key, members


class _Watched:
    """Bytes of a tar, whose end is looked at: Python's tarfile takes an archive cut between members for a whole one."""

    def __init__(self, file: Any) -> None:
        self._file, self._tail, self._beyond = file, b"", 0
        self._unread = file.read(4)
        self.is_compressed = self._unread.startswith(_COMPRESSED)

    def read(self, size: int = -1) -> bytes:
        """Bytes of the file."""
        content: bytes = self._unread + self._file.read(size if size < 0 else max(0, size - len(self._unread)))
        self._unread = b""
        self._tail = (self._tail + content)[-BLOCK:]
        self._beyond = 0 if content else self._beyond + 1
        if self._beyond > _MAX_BEYOND:  # tarfile would read on, up to the size that a header claims
            raise tarfile.ReadError("the archive ends inside a member")
        return content

    def check_end(self) -> None:
        """A ``tarfile.ReadError`` for a plain tar that does not end in an empty block."""
        while self.read(1 << 20):
            pass
        if not self.is_compressed and (len(self._tail) < BLOCK or self._tail.strip(b"\0")):
            raise tarfile.ReadError("the archive is cut short")
