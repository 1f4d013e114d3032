"""Random access into plain tar shards through an index of byte offsets, local or remote.

A shard is read with range reads alone: nothing is extracted, so a member's name can never become a path, and no shard can start a
program (``pipe:`` addresses of webdataset are refused).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INDEX_SUFFIX = ".index.json"
INDEX_VERSION = 1
_MAX_OPEN = 64
_BLOCK = 512
#: Members of one sample lie side by side; they are fetched in one read unless more than this many bytes of others lie between.
_MAX_GAP = 1 << 16
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HOW_TO_INDEX = "`python -m data_pipelines.index {path}` makes a new index"


class StaleIndexError(ValueError):
    """An index that does not describe its tar (any more): the shard was replaced, truncated or is still being written."""


def is_remote(path: str) -> bool:
    """Whether ``path`` is an address such as ``https://…`` or ``s3://…``."""
    return "://" in path


def filesystem(path: str) -> Any:
    """The fsspec file system behind a remote address.

    Raises:
        ModuleNotFoundError: fsspec is not installed.
    """
    try:
        import fsspec  # optional: only remote shards need it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path}: remote shards need fsspec; pip install 'umm_zoo[remote]'") from error
    return fsspec.core.url_to_fs(path)[0]


def expand(shards: str | Sequence[str]) -> list[str]:
    """The tar files meant by a folder, a glob, a ``{000..015}`` range, an address, or a list of these, in sorted order per entry.

    Raises:
        FileNotFoundError: an entry names nothing that exists.
        ValueError: an entry is a command (``pipe:``), or a shard is named twice.
    """
    found: list[str] = []
    for entry in [shards] if isinstance(shards, str) else list(shards):
        for pattern in _braces(str(entry)):
            found += _expand_one(pattern)
    if not found:
        raise FileNotFoundError("shards: found an empty list, accepted are a folder, a glob, or a list of tar files")
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise ValueError(f"{twice}: this shard is named twice; its samples would be read twice per epoch")
    return found


def _braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    low, high = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for n in range(int(low), int(high) + 1) for name in _braces(f"{head}{n:0{len(low)}d}{tail}")]


def _expand_one(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):
        raise ValueError(f"{pattern}: shards are read, never run; accepted are files and http(s), s3 or gs addresses")
    if is_remote(pattern):
        if not any(letter in pattern for letter in "*?["):
            return [pattern]
        files = filesystem(pattern)
        matches = sorted(files.unstrip_protocol(name) for name in files.glob(pattern))
    elif os.path.isdir(pattern):
        matches = sorted(glob(os.path.join(glob_escape(pattern), "*.tar")))
    elif os.path.isfile(pattern):
        matches = [pattern]
    else:
        matches = sorted(name for name in glob(pattern, recursive=True) if name.endswith(".tar"))
    if not matches:
        raise FileNotFoundError(f"{pattern}: no shard (*.tar) found there, looking from {os.getcwd()}")
    return matches


def glob_escape(path: str) -> str:
    """``path`` with the characters that a glob would read as wildcards made plain."""
    return re.sub(r"([*?[])", r"[\1]", path)


@dataclass
class ShardIndex:
    """Where each member of each sample lies in one tar, in flat arrays (a forked worker shares them; lists it would copy).

    Sample ``i`` has the key ``keys[key_ends[i - 1] : key_ends[i]]`` and the members ``starts[i]`` to ``starts[i + 1] - 1``.
    """

    path: str
    tar_size: int
    keys: bytes
    key_ends: NDArray[np.int64]
    starts: NDArray[np.int64]
    names: list[str]
    name_of: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.key_ends)

    @classmethod
    def from_json(cls, path: str, content: dict[str, Any]) -> ShardIndex:
        """Build from the parsed ``NAME.tar.index.json``.

        Raises:
            StaleIndexError: the content is not an index of this version.
        """
        version = content.get("version")
        if version != INDEX_VERSION:
            hint = _HOW_TO_INDEX.format(path=path)
            raise StaleIndexError(f"{path}{INDEX_SUFFIX}: found index version {version}, accepted is {INDEX_VERSION}; {hint}")
        samples = content["samples"]
        keys = [sample["key"].encode() for sample in samples]
        names: dict[str, int] = {}
        rows = [
            (names.setdefault(name, len(names)), int(offset), int(length))
            for sample in samples
            for name, (offset, length) in sample["members"].items()
        ]
        table = np.asarray(rows, dtype=np.int64).reshape(-1, 3)
        counts = np.cumsum([0] + [len(sample["members"]) for sample in samples])
        return cls(
            path=path,
            tar_size=int(content["tar_size"]),
            keys=b"".join(keys),
            key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
            starts=counts.astype(np.int64),
            names=list(names),
            name_of=table[:, 0].astype(np.int32),
            offsets=np.ascontiguousarray(table[:, 1]),
            lengths=np.ascontiguousarray(table[:, 2]),
        )

    def key(self, sample: int) -> str:
        """The key of a sample."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].decode()

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(name, offset, length) of each member of a sample."""
        part = slice(int(self.starts[sample]), int(self.starts[sample + 1]))
        names = [self.names[index] for index in self.name_of[part]]
        return list(zip(names, self.offsets[part].tolist(), self.lengths[part].tolist(), strict=True))


class RangeReader:
    """Reads byte ranges of files; keeps the files used last open, one set per process."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a worker opens its own files

    def __setstate__(self, state: dict[str, Any]) -> None:
        RangeReader.__init__(self)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on; fewer only where the file ends."""
        if is_remote(path):
            content: bytes = filesystem(path).cat_file(path, start=offset, end=offset + length)
            return content
        return os.pread(self._descriptor(path), length, offset)

    def members(self, index: ShardIndex, sample: int) -> dict[str, bytes]:
        """All members of a sample by name.

        Raises:
            StaleIndexError: the tar does not hold there what its index says.
        """
        wanted = index.members(sample)
        if not wanted:
            return {}
        first = min(offset for _, offset, _ in wanted) - _BLOCK  # the tar header in front is read along, to check the index
        last = max(offset + length for _, offset, length in wanted)
        if last - first <= sum(length + 3 * _BLOCK for _, _, length in wanted) + _MAX_GAP:
            span = self.read(index.path, first, last - first)
            parts = [(name, offset - first, length, span) for name, offset, length in wanted]
        else:
            parts = [
                (name, _BLOCK, length, self.read(index.path, offset - _BLOCK, length + _BLOCK)) for name, offset, length in wanted
            ]
        content: dict[str, bytes] = {}
        for name, start, length, span in parts:
            content[name] = span[start : start + length]
            if len(content[name]) != length or _stated_size(span[start - _BLOCK : start]) != length:
                hint = _HOW_TO_INDEX.format(path=index.path)
                raise StaleIndexError(
                    f"{index.path}: the tar holds no member '{index.key(sample)}.{name}' of {length} bytes where its index says; "
                    f"the file changed or was cut short; {hint}"
                )
        return content

    def _descriptor(self, path: str) -> int:
        if self._process != os.getpid():  # after a fork: the parent's descriptors still work, but closing is the parent's business
            self._open, self._process = OrderedDict(), os.getpid()
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        self._open[path] = os.open(path, os.O_RDONLY)
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return self._open[path]

    def __del__(self) -> None:
        if self._process == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)


def _stated_size(header: bytes) -> int:
    """The size field of a tar header (octal digits, or base 256 for members over 8 GiB); -1 where there is none."""
    field = header[124:136]
    if len(field) == 12 and field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b"\0 ").lstrip(b" ") or b"x", 8)
    except ValueError:
        return -1


# -- indexes on disk ---------------------------------------------------------------------------------------------------------


def index_paths(path: str) -> list[str]:
    """Where the index of a shard may lie: beside it, or in the user's cache where the shard's folder cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umm_zoo" / "indexes"
    whole = path if is_remote(path) else os.path.abspath(path)
    return [path + INDEX_SUFFIX, str(cache / (hashlib.sha256(whole.encode()).hexdigest()[:32] + INDEX_SUFFIX))]


def shard_size(path: str) -> int:
    """Bytes of a shard.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty.
    """
    if is_remote(path):
        size = int(filesystem(path).size(path) or 0)
    elif os.path.isfile(path):
        size = os.path.getsize(path)
    else:
        raise FileNotFoundError(f"{path}: no such shard")
    if size == 0:
        raise ValueError(f"{path}: this shard is an empty file (0 bytes); remove it or fetch it again")
    return size


def build_index(path: str, replace: bool = False) -> str:
    """Make sure that a shard has an index on disk, and return where.

    Raises:
        ValueError: the tar is truncated or no tar.
    """
    from data_pipelines.write_shards import index_tar  # the writer's half: one place knows how a tar is laid out

    size = shard_size(path)
    if not replace:
        for place in index_paths(path):
            if _exists(place):
                return place
    content = index_tar(path) if not is_remote(path) else _index_remote(path)
    if content["tar_size"] != size:
        raise ValueError(
            f"{path}: the shard changed from {size} to {content['tar_size']} bytes while it was indexed; is it still written?"
        )
    text = json.dumps(content)
    for place in index_paths(path):
        if is_remote(place):
            continue
        try:
            _write(place, text)
            return place
        except OSError as error:
            reason = error
    raise ValueError(f"{path}: its index could not be written to {' or '.join(index_paths(path))}: {reason}")


def _index_remote(path: str) -> dict[str, Any]:
    """Index a remote shard by fetching it once; afterwards only the members needed are read."""
    from data_pipelines.write_shards import index_tar

    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "shard.tar")
        filesystem(path).get_file(path, local)
        return index_tar(local)


def load_index(path: str) -> ShardIndex:
    """The index of a shard, checked against the size of the tar.

    Raises:
        FileNotFoundError: the shard does not exist.
        StaleIndexError: the index belongs to another tar.
        ValueError: the shard is empty or holds no sample.
    """
    size = shard_size(path)
    place = build_index(path)
    hint = _HOW_TO_INDEX.format(path=path)
    try:
        index = ShardIndex.from_json(path, json.loads(_read_text(place)))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StaleIndexError(f"{place}: this index cannot be read ({type(error).__name__}: {error}); {hint}") from error
    if index.tar_size != size:
        raise StaleIndexError(
            f"{path}: the tar has {size} bytes, its index was made for {index.tar_size}; the file changed or was cut short; {hint}"
        )
    if len(index) == 0:
        raise ValueError(f"{path}: this shard holds no sample; remove it or fetch it again")
    return index


def load_indexes(paths: Iterable[str]) -> list[ShardIndex]:
    """``load_index`` for several shards."""
    return [load_index(path) for path in paths]


def _exists(place: str) -> bool:
    if not is_remote(place):
        return os.path.isfile(place)
    try:
        filesystem(place).info(place)  # not `exists`, which fetches the whole file from a web server
    except FileNotFoundError:
        return False
    return True


def _read_text(place: str) -> str:
    if is_remote(place):
        return str(filesystem(place).cat_file(place).decode())
    return Path(place).read_text(encoding="utf-8")


def _write(place: str, text: str) -> None:
    """Write under a temporary name, then rename: a reader, or a crash, never meets half an index."""
    os.makedirs(os.path.dirname(os.path.abspath(place)), exist_ok=True)
    temporary = f"{place}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
