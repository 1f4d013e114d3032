"""Images that rows name: where they lie, which rows share one, and the split that each image is of."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

import numpy as np

from data_pipelines.converters.columns import ADDRESS, Columns
from data_pipelines.converters.converting import SPLITS
from data_pipelines.converters.sources import Sources
from data_pipelines.converters.texts import from_json
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import IMAGE_TYPES
from umm_zoo.errors import note

_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_NUMBERED = re.compile(rf"(\.(?:{'|'.join(IMAGE_TYPES)}))#\d+$", re.IGNORECASE)
_LONGEST_NAME = 1024
NAMES = ("train", "val", "test")


def image_cells(row: dict[str, Any], columns: Sequence[str]) -> list[Any]:
    """The images of a row: those of all columns, and of lists in them; a ``BadSampleError`` where one of a list is empty."""
    found = []
    for name in columns:
        cell = from_json(row.get(name))
        listed = cell if isinstance(cell, list) else [cell]
        there = [one for one in listed if one not in (None, "")]
        if 0 < len(there) < len(listed):
            raise BadSampleError(f"missing image: {len(listed) - len(there)} of a list of {len(listed)} are empty")
        found += there
    return found


def _name(cell: str) -> str:
    """The name of an image without blanks, and without the number of its caption (``a.jpg#0``), as Flickr8k's list has it."""
    return _NUMBERED.sub(r"\1", cell.strip().removeprefix("file://"))


def located(cell: Any, folder: Path, root: Path | None) -> Any:
    """A cell whose name, if it is one, is a name inside ``root``, or inside ``folder`` where there is no root.

    Names are of the root; or else of the table's folder (where a leading ``..`` may lead back into the root).
    """
    if isinstance(cell, dict) and not cell.get("bytes") and isinstance(cell.get("path"), str):
        cell = cell["path"]
    if isinstance(cell, int) and not isinstance(cell, bool):
        cell = str(cell)  # an id
    if not isinstance(cell, str):
        return cell
    name = _name(cell)
    if ADDRESS.match(name):
        raise BadSampleError(f"address of an image, which is not downloaded: {name[:200]}")
    if name.startswith("data:") or len(name) > _LONGEST_NAME:
        raise BadSampleError(f"bad image name: {name[:80]!r} … ({len(name):,} characters)")
    if _DRIVE.match(name):
        raise BadSampleError(f"image outside of the folder: {name[:200]}")
    plain = name.replace("\\", "/")
    pure = PurePosixPath(plain)
    if root is None or root == folder or pure.is_absolute() or (".." not in pure.parts and (root / plain).is_file()):
        return name
    path = Path(normpath(folder.absolute() / plain))
    return path.relative_to(base).as_posix() if path.is_relative_to(base := Path(normpath(root.absolute()))) else name


class RowImages:
    """The split of each row, and the rows that share an image; all rows are read once where that has to be known.

    Args:
        share: of the images held out, where neither the table's files nor a column say of which split a row is.
        groups: whether rows of one image are asked for; images that a table holds itself are each of one row.
        is_given: whether the user named the column; one that was found is used if all of it are splits.
    """

    def __init__(self, sources: Sources, columns: Columns, share: float, groups: bool, is_given: bool) -> None:
        self._sources = sources
        has_files = any(source.split for source in sources.files)
        by_column = columns.split if not has_files else None
        self.splits: list[str] = []
        #: Why a row is of no split, by its number.
        self.refused: dict[int, str] = {}
        keys, places = array("q"), array("L")
        if not (by_column or groups or (share and not has_files)):
            self.splits = [sources.of(number).split or "train" for number in range(len(sources))]
            self._order = None
            return
        said: list[str] = []
        for number in range(len(sources)):
            try:
                row = sources[number]
                key = _key(row, columns, number)
            except BadSampleError:
                row, key = {}, f"\0{number}"
            if len(sources.files) > 1:
                key = f"{sources.of(number).first}\0{key}"
            keys.append(hash(key))
            places.append(zlib.crc32(f"0 {key}".encode(errors="backslashreplace")))
            said.append(str(row.get(by_column) or "").strip().lower() if by_column else "")
        unknown = {number: f"unknown split: {name!r}"[:100] for number, name in enumerate(said) if by_column and name not in SPLITS}
        if unknown and not is_given:
            note(f"the column '{by_column}' is not used, for not all of it is train, val or test ({next(iter(unknown.values()))})")
            by_column, unknown = None, {}
        if has_files:
            self.splits = [sources.of(number).split for number in range(len(sources))]
        elif by_column:
            self.splits, self.refused = [SPLITS.get(name, "train") for name in said], unknown
        else:
            self.splits = _held_out(np.asarray(keys), np.asarray(places), share)
        self._keys = np.asarray(keys)
        self._order = np.argsort(self._keys, kind="stable") if groups else None
        self._sorted = self._keys if self._order is None else self._keys[self._order]

    def of_same_image(self, number: int) -> list[int]:
        """The rows of a row's image and split, in order, the row itself among them."""
        if self._order is None:
            return [number]
        first, last = (np.searchsorted(self._sorted, self._keys[number], side) for side in ("left", "right"))
        return [row for row in self._order[first:last].tolist() if self.splits[row] == self.splits[number]]


def _held_out(keys: np.ndarray, places: np.ndarray, share: float) -> list[str]:
    """Splits by a hash of the image, as in ``split_of``; each split that is meant has at least one image."""
    is_val = places < share * 2**32
    if share and len(np.unique(keys)) > 1 and is_val.all() | ~is_val.any():
        is_val = keys == keys[places.argmin()]
    return ["val" if held else "train" for held in is_val.tolist()]


def _key(row: dict[str, Any], columns: Columns, number: int) -> str:
    """What tells the (first) image of a row from others: its name, or its content."""
    cells = image_cells(row, columns.images)
    if not cells:
        return f"\0{number}"
    cell = cells[0]
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return hashlib.sha1(cell, usedforsecurity=False).hexdigest()
    name = unicodedata.normalize("NFC", _name(str(cell)).replace("\\", "/"))
    return PurePosixPath(name).as_posix()
