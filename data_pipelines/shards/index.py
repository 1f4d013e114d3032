"""The index of byte offsets beside each tar: its compact form on disk, found, made, checked and read when it is needed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shards.addresses import filesystem, is_remote
from umm_zoo.errors import MistakeError

INDEX_SUFFIX = ".index.json"
#: 1 wrote an object per sample, which takes some thirty times as long to read; it is still read.
INDEX_VERSION = 2
HOW_TO_INDEX = "`python -m data_pipelines.index {path}` makes a new index"
#: The head of an index (sizes, hash, counts) ends before this key; enough to open a shard without reading its offsets.
_HEAD_END = ', "duplicates":'
_HEAD_BYTES = 65_536


class StaleIndexError(MistakeError):
    """An index that does not describe its tar (any more): the shard was replaced, truncated or is still being written."""


def compact(index: dict[str, Any]) -> dict[str, Any]:
    """The form of ``write_shards.index_tar``'s result that is saved: columns instead of an object per sample.

    ``keys`` are the samples in order; ``layouts`` the lists of member names that occur and ``layout`` each sample's (one number
    where all have the same); ``offsets`` and ``sizes`` those of all members, sample after sample in the order of its layout.
    """
    layouts: dict[tuple[str, ...], int] = {}
    layout = [layouts.setdefault(tuple(sample["members"]), len(layouts)) for sample in index["samples"]]
    places = [place for sample in index["samples"] for place in sample["members"].values()]
    return {
        **{key: index[key] for key in ("version", "tar_size", "sha256", "counts", "duplicates", "skipped")},
        "layouts": [list(names) for names in layouts],
        "layout": 0 if len(layouts) == 1 else layout,
        "keys": [sample["key"] for sample in index["samples"]],
        "offsets": [offset for offset, _ in places],
        "sizes": [size for _, size in places],
    }


@dataclass
class _Columns:
    """Where each member of each sample lies, in flat arrays of the narrowest type.

    Sample ``i`` has the key ``keys[key_ends[i - 1] : key_ends[i]]``, the names ``layouts[layout[i]]`` and the members from
    ``starts[i]`` on.
    """

    keys: bytes
    key_ends: NDArray[Any]
    layouts: list[list[str]]
    layout: NDArray[Any]
    starts: NDArray[Any]
    offsets: NDArray[Any]
    sizes: NDArray[Any]

    @classmethod
    def of(cls, content: dict[str, Any]) -> _Columns:
        """From the parsed file.

        Raises:
            ValueError: columns of different lengths.
        """
        keys = [key.encode() for key in content["keys"]]
        layouts = content["layouts"]
        layout = np.broadcast_to(np.asarray(content["layout"], dtype=np.int64), len(keys))
        widths = np.asarray([len(names) for names in layouts] or [0], dtype=np.int64)[layout]
        starts = np.cumsum(widths) - widths
        if len(content["offsets"]) != len(content["sizes"]) or int(widths.sum()) != len(content["sizes"]):
            raise ValueError(f"{int(widths.sum())} members, {len(content['offsets'])} offsets and {len(content['sizes'])} sizes")
        return cls(
            keys=b"".join(keys),
            key_ends=_narrow(np.cumsum([len(key) for key in keys], dtype=np.int64)),
            layouts=layouts,
            layout=_narrow(layout) if len(layouts) > 1 else np.broadcast_to(np.uint8(0), len(keys)),
            starts=_narrow(starts),
            offsets=_narrow(np.asarray(content["offsets"], dtype=np.int64)),
            sizes=_narrow(np.asarray(content["sizes"], dtype=np.int64)),
        )


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


class ShardIndex:
    """One shard's samples: their number at once, their places when first asked for.

    The places of the shards asked for last are kept, per process; those of a run over thousands of shards would fill the memory of
    every worker.

    Args:
        path: the tar.
        place: where the index lies.
        head: ``version``, ``tar_size``, ``sha256`` and ``counts``.
        columns: the places, where they have been read already; they are then kept for good.
    """

    #: Shards whose places a process keeps.
    max_loaded: ClassVar[int] = 256
    _loaded: ClassVar[OrderedDict[tuple[str, str], _Columns]] = OrderedDict()

    def __init__(self, path: str, place: str, head: dict[str, Any], columns: _Columns | None = None) -> None:
        self.path, self.place = path, place
        self.tar_size, self.sha256 = int(head["tar_size"]), str(head.get("sha256", ""))
        self.num_samples = int(head["counts"]["samples"])
        self._columns = columns
        # as what its places are kept: the same name may be another file from another folder, or after it was written again
        self._name = (os.path.abspath(place), f"{self.tar_size} {self.num_samples} {self.sha256}")

    def __len__(self) -> int:
        return self.num_samples

    def key(self, sample: int) -> str:
        """The key of a sample."""
        columns = self._places()
        start = int(columns.key_ends[sample - 1]) if sample else 0
        return columns.keys[start : int(columns.key_ends[sample])].decode()

    def keys(self) -> list[str]:
        """The keys of all samples in order."""
        columns = self._places()
        ends = columns.key_ends.tolist()
        return [columns.keys[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]

    def names(self, sample: int) -> list[str]:
        """The member names of a sample."""
        columns = self._places()
        return columns.layouts[columns.layout[sample]]

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(name, offset, length) of each member of a sample."""
        columns = self._places()
        names = columns.layouts[columns.layout[sample]]
        start = int(columns.starts[sample])
        part = slice(start, start + len(names))
        return list(zip(names, columns.offsets[part].tolist(), columns.sizes[part].tolist(), strict=True))

    def _places(self) -> _Columns:
        if self._columns is not None:
            return self._columns
        if (columns := self._loaded.get(self._name)) is None:
            content = _parse(self.path, self.place, _read_text(self.place))
            if content["tar_size"] != self.tar_size or content["counts"]["samples"] != self.num_samples:
                hint = HOW_TO_INDEX.format(path=self.path)
                raise StaleIndexError(f"{self.place}: the index was replaced while it is in use; start again, or {hint}")
            columns = self._loaded[self._name] = _columns(self.path, self.place, content)
            while len(self._loaded) > self.max_loaded:
                self._loaded.popitem(last=False)
        else:
            self._loaded.move_to_end(self._name)
        return columns


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
    from data_pipelines.shards.writing import index_tar  # the writer's half: one place knows how a tar is laid out

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
    text = json.dumps(compact(content), ensure_ascii=False)
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
    from data_pipelines.shards.writing import index_tar

    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "shard.tar")
        filesystem(path).get_file(path, local)
        return index_tar(local)


def load_index(path: str) -> ShardIndex:
    """The index of a shard, checked against the size of the tar. Of a local one only the head is read.

    Raises:
        FileNotFoundError: the shard does not exist.
        StaleIndexError: the index belongs to another tar.
        ValueError: the shard is empty or holds no sample.
    """
    size = shard_size(path)
    place = build_index(path)
    head = None if is_remote(place) else _read_head(place)
    if head is not None and head.get("version") in (1, INDEX_VERSION):
        index = ShardIndex(path, place, head)
    else:
        content = _parse(path, place, _read_text(place))
        index = ShardIndex(path, place, content, _columns(path, place, content))
    if index.tar_size != size:
        hint = HOW_TO_INDEX.format(path=path)
        raise StaleIndexError(
            f"{path}: the tar has {size} bytes, its index was made for {index.tar_size}; the file changed or was cut short; {hint}"
        )
    if len(index) == 0:
        raise ValueError(f"{path}: this shard holds no sample; remove it or fetch it again")
    return index


def load_indexes(paths: Iterable[str]) -> list[ShardIndex]:
    """``load_index`` for several shards."""
    return [load_index(path) for path in paths]


def _read_head(place: str) -> dict[str, Any] | None:
    """The head of a local index, None where it cannot be told apart from the rest."""
    with open(place, "rb") as file:
        start = file.read(_HEAD_BYTES).decode("utf-8", "replace")
        file.seek(max(0, os.path.getsize(place) - 2))
        whole = file.read().rstrip().endswith(b"}")
    end = start.replace(',"duplicates":', _HEAD_END).find(_HEAD_END) if whole else -1
    if end < 0:
        return None
    try:
        head: dict[str, Any] = json.loads(start[:end] + "}")
        return head if isinstance(head["counts"]["samples"], int) and isinstance(head["tar_size"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _parse(path: str, place: str, text: str) -> dict[str, Any]:
    """The content of an index, in the columns of version 2 whichever it is written in.

    Raises:
        StaleIndexError: it cannot be read, or is of an unknown version.
    """
    hint = HOW_TO_INDEX.format(path=path)
    try:
        content: dict[str, Any] = json.loads(text)
        version = content["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise StaleIndexError(f"{place}: this index cannot be read ({type(error).__name__}: {error}); {hint}") from error
    if version not in (1, INDEX_VERSION):
        raise StaleIndexError(f"{place}: found index version {version}, expected 1 and {INDEX_VERSION}; {hint}")
    return compact(content) if version == 1 else content


def _columns(path: str, place: str, content: dict[str, Any]) -> _Columns:
    try:
        return _Columns.of(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        hint = HOW_TO_INDEX.format(path=path)
        raise StaleIndexError(f"{place}: this index cannot be read ({type(error).__name__}: {error}); {hint}") from error


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
