"""Rows of parquet files by their number, read a few at a time.

Parquet holds plain columns; pyarrow has refused to unpickle anything a file asks for since 14.0.1, and at least 18 is demanded.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_pipelines.converters.rows import names_in
from data_pipelines.decoding import BadSampleError, one_sample
from umm_zoo.errors import UserError

_AT_ONCE = 16  # rows held in memory: an uncompressed image may have many megabytes


def is_parquet(source: Path) -> bool:
    """Whether a source means parquet files: by its suffix, or because it is a folder."""
    return source.suffix == ".parquet" or source.is_dir()


class ParquetRows:
    """Rows of one or more parquet files, as if they were one.

    Reading in order costs one pass; a jump costs the row groups up to the row of that file. ``source`` is a file, a folder (with
    its sub-folders), a glob, or the files themselves.
    """

    def __init__(self, source: Path | Sequence[Path]) -> None:
        self._parquet = _pyarrow()
        self.unreadable: dict[str, str] = {}
        self.paths: list[Path] = []
        self.columns: list[str] | None = None
        lengths: list[int] = []
        for path in find_parquet(source) if isinstance(source, Path) else source:
            try:
                with self._parquet.ParquetFile(path) as file:
                    schema, rows = file.schema_arrow, file.metadata.num_rows
            except Exception as error:
                self.unreadable[str(path)] = f"unreadable file: {' '.join(str(error).split())[:200]}"
                continue
            if not self.paths:
                self.kinds = {field.name: _kind(field.type) for field in schema}
            elif set(schema.names) != set(self.kinds):
                raise UserError(path, f"columns {', '.join(schema.names)}", f"{', '.join(self.kinds)} as in {self.paths[0]}")
            self.paths.append(path)
            lengths.append(rows)
        if not self.paths:
            raise UserError(
                source if isinstance(source, Path) else source[0],
                "no file can be read",
                hint="; ".join(f"{p}: {why}" for p, why in self.unreadable.items()),
            )
        self._starts = [0, *accumulate(lengths)]
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._first, self._last, self._end = 0, 0, 0  # rows of the batch, and where its row group ends
        self._file: Any = None
        self._names: set[int] | None = None
        self._place = -1

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row; a ``BadSampleError`` where the file is damaged there."""
        try:
            if not self._first <= number < self._last + _AT_ONCE or number >= self._end:
                self._open(number)
            while number >= self._last:
                self._batch = next(self._batches)
                self._first, self._last = self._last, self._last + len(self._batch)
        except Exception as error:
            self._first = self._last = self._end = 0
            raise BadSampleError(f"unreadable row: {' '.join(str(error).split())[:200]}") from error
        with one_sample("unreadable row"):  # one by one: a text that is not UTF-8 costs no other row
            row: dict[str, Any] = self._batch.slice(number - self._first, 1).to_pylist()[0]
            return row

    def _open(self, number: int) -> None:
        """Go to the row group that holds a row; one at a time, so that a damaged one costs no other its rows."""
        place = bisect_right(self._starts, number) - 1
        if place != self._place:
            self._file, self._place = self._parquet.ParquetFile(self.paths[place]), place
        first, group = self._starts[place], 0
        while first + (rows := self._file.metadata.row_group(group).num_rows) <= number:
            first += rows
            group += 1
        self._batches = self._file.iter_batches(batch_size=_AT_ONCE, row_groups=[group], columns=self.columns)
        self._first = self._last = first
        self._batch, self._end = None, first + rows

    def bytes_columns(self) -> list[str]:
        """The columns that hold images."""
        return [name for name, kind in self.kinds.items() if kind == "image"]

    def only(self, columns: list[str] | None) -> None:
        """Read these columns from now on; all of them for None."""
        self.columns, self._first, self._last, self._end = columns, 0, 0, 0

    def names_file(self, name: str) -> bool:
        """Whether a text of any row, or the path of an image, is this name; the images themselves are not read for that."""
        if self._names is None:
            self._names = set()
            columns = [column for column, kind in self.kinds.items() if kind in ("text", "turns")]
            columns += [f"{column}{inner}" for column in self.kinds for inner in (".path", ".list.element.path")]
            for path in self.paths:
                with suppress(Exception), self._parquet.ParquetFile(path) as file:  # a damaged row names nothing
                    for batch in file.iter_batches(columns=columns):
                        self._names |= names_in(batch.to_pylist())
        return hash(name) in self._names

    def fingerprint(self) -> str:
        """A hash of the files' names and sizes: terabytes are not read to know that they are still the same."""
        listed = "\n".join(f"{path.name} {path.stat().st_size}" for path in self.paths)
        return hashlib.sha256(listed.encode()).hexdigest()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet  # optional: only these converters need it
    except ModuleNotFoundError as error:
        raise UserError("", "reading parquet needs pyarrow", hint="pip install 'umm_zoo[parquet]'") from error
    return pyarrow.parquet


def find_parquet(source: Path) -> list[Path]:
    """The parquet files that a file, a folder or a glob means."""
    named = [source] if source.is_file() else map(Path, glob(str(source), recursive=True))
    found = sorted(source.rglob("*.parquet") if source.is_dir() else named)
    if not found:
        raise UserError(source, "no parquet file found there")
    return found


def _kind(column: Any) -> str:
    """``image`` (bytes, or a struct with bytes), ``text``, ``turns`` (a struct of texts), ``number`` or ``other``; lists count as
    what they hold.
    """
    from pyarrow import types

    if types.is_list(column) or types.is_large_list(column) or types.is_dictionary(column):
        return _kind(column.value_type)
    if types.is_struct(column):
        names = {column.field(place).name for place in range(column.num_fields)}
        return "image" if "bytes" in names else "turns" if names & {"value", "content", "user", "text"} else "other"
    if types.is_binary(column) or types.is_large_binary(column):
        return "image"
    if types.is_string(column) or types.is_large_string(column):
        return "text"
    return "number" if types.is_integer(column) or types.is_floating(column) or types.is_boolean(column) else "other"
