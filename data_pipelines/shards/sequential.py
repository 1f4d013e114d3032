"""Reader of a tar from front to back, for shards without an index; members are read, never extracted: no name becomes a path.

webdataset's own iterator would read a member of any claimed size, a sparse one too, and take a tar that is cut between members for
a whole one.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any

from data_pipelines.shards.addresses import filesystem, is_remote
from data_pipelines.shards.indexing import split_member_name

_BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX")
_MAX_MEMBER = 1 << 28  # 256 MiB: no image or text is larger, and a header may claim anything


def read_samples(path: str, cut_too: bool = False) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of the samples of one tar in order; a TarError, OSError or ValueError where the rest cannot be read.

    Members of one sample stand side by side, as every writer of this layout puts them. The sample before a cut, of which members
    may be missing, is left out unless ``cut_too``.
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
