"""Files of a table: which they are, how they are read, and the splits that their names or folders say."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.converters.columns import kinds_of
from data_pipelines.converters.converting import SPLITS
from data_pipelines.converters.csv_rows import CsvRows
from data_pipelines.converters.parquet_rows import ParquetRows, find_parquet
from data_pipelines.converters.rows import Rows
from data_pipelines.decoding import BadSampleError
from umm_zoo.errors import UserError

_TEXTS, _JSON = (".csv", ".tsv", ".tab", ".psv", ".txt"), (".json", ".jsonl", ".ndjson")
#: Suffixes of files that are most likely a table where they lie beside images.
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))  # of Hugging Face's image folders
_TRIED = 200  # rows that are looked at to find what the columns hold


@dataclass(frozen=True)
class Source:
    """Rows of one file, or of parquet files of one split: the folder of their images, their split if any, their first number."""

    rows: Rows | CsvRows | ParquetRows
    folder: Path
    split: str
    first: int


class Sources:
    """Rows of all files of a table, numbered through.

    Args:
        place: a file; a folder with a metadata file, also one in each folder of a split, or with parquet files; a glob of those.
        options: arguments of `CsvRows`.

    Raises:
        UserError: there is no table, or files of other columns.
    """

    def __init__(self, place: Path, **options: Any) -> None:
        self.files: list[Source] = []
        self.kinds: dict[str, str] = {}
        first = 0
        for split, folder, opened in _found(place, options):
            rows = opened()
            kinds = _kinds(rows)
            if self.kinds and kinds.keys() != self.kinds.keys():
                raise UserError(folder, f"columns {', '.join(kinds)}", f"{', '.join(self.kinds)} as in {self.files[0].folder}")
            self.kinds = {
                name: kind if (former := self.kinds.get(name, "empty")) == "empty" else former for name, kind in kinds.items()
            }
            self.files.append(Source(rows, folder, split, first))
            first += len(rows)
        self._length, self._firsts = first, [source.first for source in self.files]
        self.unreadable = {label: why for source in self.files for label, why in source.rows.unreadable.items()}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row; a ``BadSampleError`` where it cannot be read."""
        source = self.of(number)
        return source.rows[number - source.first]

    def of(self, number: int) -> Source:
        """The file of a row."""
        return self.files[bisect_right(self._firsts, number) - 1]

    def repairs(self, number: int) -> list[str]:
        """What was repaired to read a row."""
        source = self.of(number)
        found = source.rows.repairs.get(number - source.first) if isinstance(source.rows, CsvRows) else None
        return [found] if found else []

    def names_file(self, name: str) -> bool:
        """Whether a value of any row is this name of an image."""
        return any(source.rows.names_file(name) for source in self.files)

    def bytes_columns(self) -> list[str]:
        """The columns that hold images, and not their names."""
        return [name for source in self.files[:1] if isinstance(source.rows, ParquetRows) for name in source.rows.bytes_columns()]

    def leave_out(self, columns: Sequence[str]) -> None:
        """Read the other columns alone, where that saves reading."""
        for source in self.files:
            if isinstance(source.rows, ParquetRows):
                source.rows.only([name for name in self.kinds if name not in columns])

    def fingerprint(self) -> str:
        """A hash of the files."""
        return hashlib.sha256("\n".join(source.rows.fingerprint() for source in self.files).encode()).hexdigest()


def _found(place: Path, options: dict[str, Any]) -> list[tuple[str, Path, Callable[[], Rows | CsvRows | ParquetRows]]]:
    """Split, folder and rows of each file that a place means."""
    if not place.is_dir():
        if place.suffix.lower() != ".parquet":
            return [("", place.parent, lambda: _rows(place, options))]
        paths = find_parquet(place)
        return [("", paths[0].parent, lambda: ParquetRows(paths))] if len(paths) == 1 else _parquet(paths)
    if (file := _metadata(place)) is not None:
        return [("", place, lambda: _rows(file, options))]
    folders = [(SPLITS[folder.name.lower()], folder) for folder in sorted(place.iterdir()) if folder.name.lower() in SPLITS]
    files = [(split, folder, file) for split, folder in folders if (file := _metadata(folder)) is not None]
    if files:
        return [(split, folder, lambda file=file: _rows(file, options)) for split, folder, file in files]  # type: ignore[misc]
    try:
        return _parquet(find_parquet(place))
    except UserError as error:
        lists = sorted(path.name for path in place.iterdir() if path.suffix.lower() in (*_TEXTS, *_JSON))
        hint = f"name the file: {', '.join(lists[:5])}" if lists else ""
        raise UserError(place, "a folder without metadata.jsonl, metadata.csv or parquet files", hint=hint) from error


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in _METADATA if (folder / name).is_file()), None)


def _parquet(paths: Sequence[Path]) -> list[tuple[str, Path, Callable[[], Rows | CsvRows | ParquetRows]]]:
    """Files of one split each where all are called so, ``train-00000-of-00002.parquet``, else together."""
    named = [SPLITS.get(path.stem.lower().partition("-")[0], "") for path in paths]
    splits = sorted(set(named)) if "" not in named and len(set(named)) > 1 else [""]
    chosen = {split: [path for path, its in zip(paths, named, strict=True) if not split or its == split] for split in splits}
    return [(split, files[0].parent, lambda files=files: ParquetRows(files)) for split, files in chosen.items()]  # type: ignore[misc]


def _rows(path: Path, options: dict[str, Any]) -> Rows | CsvRows | ParquetRows:
    suffix = path.suffix.lower()
    if suffix in _TEXTS:
        tab = "\t" if suffix in (".tsv", ".tab") else None
        return CsvRows(path, **{**options, "delimiter": options.get("delimiter") or tab})
    if suffix in _JSON:
        return Rows(path)
    if suffix == ".parquet":
        return ParquetRows([path])
    if not path.is_file():
        raise UserError(path, "no such file")
    hint = {".xlsx": "save it as CSV", ".xls": "save it as CSV", ".gz": "unpack it first", ".zip": "unpack it first"}.get(
        suffix, ""
    )
    raise UserError(
        path, f"a file that ends in '{suffix}'", f"{' '.join((*_TEXTS, *_JSON, '.parquet'))}, or a folder of those", hint
    )


def _kinds(rows: Rows | CsvRows | ParquetRows) -> dict[str, str]:
    """What the columns hold: of parquet by their types, and by their cells where a type tells little."""
    if isinstance(rows, ParquetRows):
        texts = [name for name, kind in rows.kinds.items() if kind == "text"]
        rows.only(texts)
        kinds = {**rows.kinds, **(kinds_of(texts, _some(rows, range(min(len(rows), _TRIED)))) if texts else {})}
        rows.only(None)
        held = rows.bytes_columns()  # beside images themselves no name is one
        return {name: rows.kinds[name] if kind == "empty" or (held and kind == "image") else kind for name, kind in kinds.items()}
    some = _some(rows, range(0, len(rows), max(1, len(rows) // _TRIED)))
    names = rows.columns if isinstance(rows, CsvRows) else list(dict.fromkeys(name for row in some for name in row))
    kinds = kinds_of(names, some)
    if isinstance(rows, Rows):
        if some and {"images", "annotations"} <= some[0].keys():
            raise UserError(rows.path, "the layout of COCO", "a list of rows", "data_pipelines.coco reads it")
        rows.check_wrapped(*(name for name, kind in kinds.items() if kind in ("image", "turns")))
        if len(rows) == 1 and len(some) and all(isinstance(cell, list | dict) for cell in some[0].values()) and len(some[0]) > 1:
            hint = "pandas writes rows with to_json(FILE, orient='records', lines=True)"
            raise UserError(rows.path, "one object of columns", "a JSON list of rows, or JSON Lines", hint)
    return kinds


def _some(rows: Rows | CsvRows | ParquetRows, numbers: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for number in numbers:
        try:
            found.append(rows[number])
        except BadSampleError:  # counted when it is converted
            continue
    return found
