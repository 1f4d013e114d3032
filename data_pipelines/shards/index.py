"""Index of a shard in memory: its samples and the places of their members, read when they are needed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.decoding import BadSampleError
from data_pipelines.shards.addresses import is_remote, shown
from data_pipelines.shards.headers import BLOCK
from data_pipelines.shards.indexing import (
    READABLE,
    ShardUserError,
    build_index,
    check_content,
    find_index,
    read_index,
    shard_state,
    stale_index,
)
from data_pipelines.shards.measures import Measures, narrow, whole_numbers
from data_pipelines.shards.remote import State
from umm_zoo.errors import UserError

#: The head of an index (sizes, hash, counts) ends before this key; enough to open a shard without reading its offsets.
_HEAD_END = ',"duplicates":'
_HEAD_BYTES = 65_536


@dataclass
class _Columns:
    """Places of the members of all samples, in flat arrays of the narrowest type.

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

    refused: dict[int, str]

    @classmethod
    def of(cls, content: dict[str, Any]) -> _Columns:
        """From the parsed file; a ``ValueError`` where the columns contradict each other, the counts or the size of the tar."""
        keys, layouts = content["keys"], content["layouts"]
        if not (_texts(keys) and isinstance(layouts, list) and all(map(_texts, layouts))):
            raise ValueError("keys or layouts are no lists of texts")
        if len(keys) != content["counts"]["samples"] or len(set(keys)) < len(keys):
            raise ValueError(f"{len(keys)} keys, {len(set(keys))} different, for {content['counts']['samples']} samples")
        alike = isinstance(content["layout"], int)
        layout = np.broadcast_to(whole_numbers([content["layout"]] if alike else content["layout"], len(layouts)), len(keys))
        offsets, sizes = (whole_numbers(content[name], content["tar_size"] + 1) for name in ("offsets", "sizes"))
        widths = np.asarray([len(names) for names in layouts] or [0], dtype=np.int64)[layout]
        if len(offsets) != len(sizes) or int(widths.sum()) != len(sizes):
            raise ValueError(f"{int(widths.sum())} members, {len(offsets)} offsets and {len(sizes)} sizes")
        order = np.argsort(offsets, kind="stable")
        ends = np.concatenate([[0], (offsets + sizes)[order]])
        if (offsets[order] < ends[:-1] + BLOCK).any() or ends[-1] > content["tar_size"] or (offsets % BLOCK).any():
            raise ValueError("members overlap, or lie outside of the tar")
        encoded = [key.encode() for key in keys]
        return cls(
            keys=b"".join(encoded),
            key_ends=narrow(np.cumsum([len(key) for key in encoded], dtype=np.int64)),
            layouts=layouts,
            layout=narrow(layout) if len(layouts) > 1 else np.broadcast_to(np.uint8(0), len(keys)),
            starts=narrow(np.cumsum(widths) - widths),
            offsets=narrow(offsets),
            sizes=narrow(sizes),
            refused={int(number): str(reason) for number, reason in content.get("refused", {}).items()},
        )


def _texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


class ShardIndex:
    """Samples of one shard: their number is known at once, their places are read when first needed.

    ``place`` is where the index lies, ``tag`` the version of a remote shard that its server names, ``head`` has ``tar_size``,
    ``sha256`` and ``counts``; ``measured`` tells its measures from others, and is empty where it has none; ``damage`` says what is
    damaged between its samples; ``columns`` are places that have been read already, and are then kept for good.
    """

    def __init__(self, path: str, place: str, tag: str, head: dict[str, Any], columns: _Columns | None = None) -> None:
        self.path, self.place, self.tag, self.shown = path, place, tag, shown(path)
        self.tar_size, self.sha256 = int(head["tar_size"]), str(head.get("sha256", ""))
        self.measured = str(head.get("measured", ""))
        self.num_samples = int(head["counts"]["samples"])
        self.damage = [str(text) for text in head["counts"].get("damage", ())]
        self._columns = columns

    def __len__(self) -> int:
        return self.num_samples

    def key(self, sample: int) -> str:
        """The key of a sample."""
        columns = self._places()
        start = int(columns.key_ends[sample - 1]) if sample else 0
        return columns.keys[start : int(columns.key_ends[sample])].decode()

    def keys(self) -> list[str]:
        """The keys of all samples in order."""
        return [self.key(sample) for sample in range(len(self))]

    def names(self, sample: int) -> list[str]:
        """The member names of a sample."""
        columns = self._places()
        return columns.layouts[columns.layout[sample]]

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(name, offset, length) of each member of a sample; a ``BadSampleError`` where its headers say that it cannot be used."""
        columns, names = self._places(), self.names(sample)
        if sample in columns.refused:
            raise BadSampleError(columns.refused[sample])
        start = int(columns.starts[sample])
        part = slice(start, start + len(names))
        return list(zip(names, columns.offsets[part].tolist(), columns.sizes[part].tolist(), strict=True))

    def measures(self) -> Measures:
        """The measures of all samples, read again at each call; a ``UserError`` where the index has none."""
        content, columns = _parse(self.path, self.place)
        if content.get("measured", "") != self.measured:
            raise stale_index(self.path, self.place, "the index was replaced while it is in use; start again")
        try:
            return Measures.of(content, columns.layout)
        except Exception as error:
            raise _unreadable(self.path, self.place, error) from error

    def _places(self) -> _Columns:
        if self._columns is not None:
            return self._columns
        # the same name may be another file from another folder, or after it was written again
        return _kept_columns(self.path, os.path.abspath(self.place), self.tar_size, self.num_samples, self.sha256)


@lru_cache(256)
def _kept_columns(path: str, place: str, tar_size: int, num_samples: int, sha256: str) -> _Columns:
    """The places of the shards used last, per process; those of thousands of shards would fill the memory of every worker."""
    content, columns = _parse(path, place)
    if (content["tar_size"], content["counts"]["samples"]) != (tar_size, num_samples):
        raise stale_index(path, place, "the index was replaced while it is in use; start again")
    return columns


def load_index(path: str, before_upgrade: Callable[[], None] | None = None) -> ShardIndex:
    """The index of a shard, checked against the size of the tar, and its content where its time has changed.

    Made where there is none. With ``before_upgrade`` one without measures is made again, after it was called. Of a local one only
    the head is read.
    """
    now = shard_state(path)
    index = _opened(path, build_index(path, now=now), now)
    if before_upgrade is not None and not index.measured:  # it was of this very tar, and so is the one that takes its place
        place = find_index(path, now, partial(is_current, path))
        if place is None:
            before_upgrade()
        index = _opened(path, place or build_index(path, replace=True, now=now), now)
    return index


def _opened(path: str, place: str, now: State) -> ShardIndex:
    size, tag = now
    head = None if is_remote(place) else _read_head(place)
    index = ShardIndex(path, place, tag, *(_parse(path, place) if head is None else (head,)))
    if index.tar_size != size:
        found = f"the tar has {size} bytes, its index was made for {index.tar_size}; the file changed or was cut short"
        raise stale_index(path, path, found)
    if len(index) == 0:
        raise ShardUserError(shown(path), "this shard holds no sample; remove it or fetch it again")
    if not is_remote(path):
        check_content(path, place, index.sha256)
    return index


def is_current(path: str, place: str) -> bool:
    """Whether the index of a shard at ``place`` is not one of the version before, which has no measures."""
    try:
        head = None if is_remote(place) else _read_head(place)
        return bool((_parse(path, place)[0] if head is None else head).get("measured"))
    except UserError:
        return True  # whoever reads it will say what it is


def _read_head(place: str) -> dict[str, Any] | None:
    """The head of a local index, None where it cannot be recognised."""
    with open(place, "rb") as file:
        start = file.read(_HEAD_BYTES).decode("utf-8", "replace").replace(', "duplicates":', _HEAD_END)
        file.seek(max(0, os.path.getsize(place) - 2))
        whole = file.read().rstrip().endswith(b"}")
    try:
        head: dict[str, Any] = json.loads(start.partition(_HEAD_END)[0] + "}")
        return head if whole and head["version"] in READABLE and _sound(head) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _sound(head: dict[str, Any]) -> bool:
    """Whether a tar of that size can hold so many samples; whoever believes any count reserves gigabytes."""
    samples, size, digest = head["counts"]["samples"], head["tar_size"], head["sha256"]
    return type(samples) is type(size) is int and 0 <= samples * BLOCK <= size and re.fullmatch("[0-9a-f]{64}", digest) is not None


def _parse(path: str, place: str) -> tuple[dict[str, Any], _Columns]:
    """The content of an index."""
    try:
        content = read_index(place)
        if (version := content["version"]) not in READABLE:
            raise stale_index(path, place, f"index version {version!r}", " or ".join(map(str, READABLE)))
        if not _sound(content):
            raise ValueError(f"{content['counts']['samples']} samples in {content['tar_size']} bytes")
        return content, _Columns.of(content)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes the parsers raise
        raise _unreadable(path, place, error) from error


def _unreadable(path: str, place: str, error: Exception) -> UserError:
    return stale_index(path, place, f"this index cannot be read ({type(error).__name__}: {str(error)[:120]})")
