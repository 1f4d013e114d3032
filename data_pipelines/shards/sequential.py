"""Reader of a tar from front to back through webdataset, for shards without an index."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any

import webdataset as wds

from data_pipelines.shards.addresses import filesystem, is_remote
from data_pipelines.shards.indexing import split_member_name

_BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX")


def read_samples(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of the samples of one tar in order; a TarError, OSError or ValueError where the rest cannot be read."""
    # opened here, for webdataset would start a shell for an address
    with filesystem(path).open(path, "rb") if is_remote(path) else open(path, "rb") as file:
        key, members = "", dict[str, bytes]()
        watched = _Watched(file)
        for entry in wds.tariterators.tar_file_iterator(watched, skip_meta=None, handler=wds.reraise_exception):
            own, name = split_member_name(entry["fname"])
            if own and own != key:
                if members:
                    yield key, members
                key, members = own, {}
            if own:
                members.setdefault(name, entry["data"])
        watched.check_end()  # before the last sample, of which the end may be missing
        if members:
            yield key, members


class _Watched:
    """Passes the bytes of a tar on and looks at its end: Python's tarfile takes an archive cut between members for a whole one."""

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
