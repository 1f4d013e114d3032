"""Measures of samples in an index: the sizes of their images, by headers alone, and the lengths of their texts.

They say which samples go well together (see ``buckets.py``) and nothing else: wrong ones cost speed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.decoding import MAX_PIXELS, BadSampleError, open_image, upright_size
from data_pipelines.tasks import IMAGE_TYPES, read_turns

#: Texts of more bytes are not looked at (our choice: far above what any task takes); their length is 0.
_LONGEST = 1 << 20
#: The columns of an index, with the largest value of each.
COLUMNS = {"widths": MAX_PIXELS, "heights": MAX_PIXELS, "lengths": _LONGEST}


def measures_of(
    path: Path,
    samples: Mapping[str, Mapping[str, tuple[int, int]]],
    refused: Container[str],
    advance: Callable[[int], None] | None = None,
) -> dict[str, list[int]]:
    """The columns of an index about what its samples hold.

    Images are the members whose names end in the suffix of an image format, in the order of the members; a damaged one has the size
    0 x 0. The length of the text is in characters: of all turns of the conversation where the ``json`` member has one (markers of
    images count as they are written), else of the members called ``txt`` or ending in ``.txt``; 0 where there is no text, or none
    that can be read.

    Args:
        path: of the tar.
        samples: (offset, size) of each member of each sample.
        refused: samples that cannot be used, of which nothing is read.
        advance: told of the bytes that are done.

    Returns:
        ``widths`` and ``heights`` of all images, upright, sample after sample, and ``lengths`` of the texts of all samples.
    """
    sizes, lengths, done = list[tuple[int, int]](), list[int](), 0
    with open(path, "rb") as file:
        for key, members in samples.items():
            content = (
                {}
                if key in refused
                else {
                    name: os.pread(file.fileno(), size, offset)
                    for name, (offset, size) in members.items()
                    if is_image(name) or name == "json" or _is_text(name)
                }
            )
            sizes += [_size(content.get(name, b"")) for name in members if is_image(name)]
            lengths.append(_length(content))
            end = max(offset + size for offset, size in members.values())
            if advance is not None and end > done:
                advance(end - done)
                done = end
    if advance is not None:
        advance(os.path.getsize(path) - done)
    return {"widths": [width for width, _ in sizes], "heights": [height for _, height in sizes], "lengths": lengths}


def is_image(name: str) -> bool:
    """Whether a member is measured as an image: ``jpg``, ``0.png``, ``target.webp`` …"""
    return name.rpartition(".")[2] in IMAGE_TYPES


def _size(content: bytes) -> tuple[int, int]:
    try:
        with open_image(content) as image:
            return upright_size(image)
    except BadSampleError:
        return 0, 0


def _is_text(name: str) -> bool:
    return name == "txt" or name.endswith(".txt")


def _length(members: Mapping[str, bytes]) -> int:
    try:
        if b'"conversations"' in (content := members.get("json", b"")) and len(content) <= _LONGEST:
            row = json.loads(content)
            if isinstance(row, dict) and "conversations" in row:
                return sum(len(turn["text"]) for turn in read_turns(row["conversations"]))
        texts = [content for name, content in members.items() if _is_text(name) and len(content) <= _LONGEST]
        return min(_LONGEST, sum(len(text.decode("utf-8-sig").strip()) for text in texts))
    except Exception:  # whatever hostile bytes make a parser raise: the loader will say what is wrong with the sample
        return 0


def digest(columns: dict[str, Any]) -> str:
    """The sha256 of the columns of an index: what an order by buckets depends on."""
    made = hashlib.sha256()
    for name in COLUMNS:
        made.update(f"{name} {len(columns[name])}\n".encode() + np.asarray(columns[name], dtype="<i8").tobytes())
    return made.hexdigest()


def digest_of(digests: Iterable[str]) -> str:
    """One digest of those of several indexes."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


@dataclass
class Measures:
    """Measures of the samples of one shard, in flat arrays of the narrowest type.

    Sample ``i`` has the names ``layouts[layout[i]]``, a text of ``lengths[i]`` characters and the images from ``starts[i]`` on.
    """

    layouts: list[list[str]]
    layout: NDArray[Any]
    starts: NDArray[Any]
    widths: NDArray[Any]
    heights: NDArray[Any]
    lengths: NDArray[Any]

    @classmethod
    def of(cls, content: dict[str, Any], layout: NDArray[Any]) -> Measures:
        """From the parsed index, whose places have been checked; a ``ValueError`` where its measures contradict them."""
        arrays = [whole_numbers(content[name], bound + 1) for name, bound in COLUMNS.items()]
        widths, heights, lengths = arrays
        images = np.asarray([sum(map(is_image, names)) for names in content["layouts"]] or [0], dtype=np.int64)[layout]
        if not (len(widths) == len(heights) == int(images.sum()) and len(lengths) == len(layout)):
            found = f"{len(widths)} widths, {len(heights)} heights, {len(lengths)} lengths"
            raise ValueError(f"{found} for {int(images.sum())} images of {len(layout)} samples")
        if digest(dict(zip(COLUMNS, arrays, strict=True))) != content["measured"]:
            raise ValueError("its measures are not those that its head names")
        return cls(content["layouts"], layout, narrow(np.cumsum(images) - images), *map(narrow, arrays))


def whole_numbers(values: Any, bound: int) -> NDArray[np.int64]:
    """A list of whole numbers from 0 to below ``bound``; a ``ValueError`` where it is something else."""
    array = np.asarray(values if values else np.empty(0, dtype=np.int64))
    if array.ndim != 1 or array.dtype != np.int64 or (array < 0).any() or (array >= bound).any():
        raise ValueError(f"a column that is no list of whole numbers from 0 to {bound - 1}")
    return array


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """The same whole numbers in the narrowest type."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
