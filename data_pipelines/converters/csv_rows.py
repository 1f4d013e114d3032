"""Rows of a table in a text file (CSV, TSV, whatever its delimiter), as spreadsheets, databases and hands write them.

Of the file only the byte offsets of its rows are held; a text in another encoding than UTF-8 is held as a whole.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines.converters.rows import IMAGE_NAME, RowFile
from data_pipelines.decoding import BadSampleError, check_utf8
from umm_zoo.errors import UserError

#: Of two that fit alike the first is taken, for a text holds commas before it holds tabs.
DELIMITERS = "\t|;,"
#: What data frames and spreadsheets write where there was nothing.
_NOTHING = ("", "nan", "NaN", "null", "NULL", "<NA>", "#N/A")
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SEPARATOR = re.compile(r"sep=(.)")  # Excel's first line
_QUOTINGS: tuple[dict[str, Any], ...] = ({}, {"doublequote": False, "escapechar": "\\"})
_LONGEST_CELL = 1 << 20
_TRIED = 100  # lines that are looked at to find the delimiter
_START = 1 << 16  # bytes that are looked at to find the encoding


class CsvRows(RowFile):
    """Rows by number: a map from the names of the columns to texts, and None where a cell is empty.

    Blank lines are no rows. Cells in quotes may hold line ends; where quotes do not match, those of that line alone are taken as
    they stand. A column without a name is called ``column 3``, a second one of a name ``name 2``.

    Args:
        delimiter: None for the one of `DELIMITERS` that fits.
        encoding: None for UTF-8, or for UTF-16 and UTF-32 where the file says so.
        columns: names of the columns of a file whose first line is a row already.

    Raises:
        UserError: there is no header, no row, or another encoding.
    """

    def __init__(
        self, path: Path, delimiter: str | None = None, encoding: str | None = None, columns: Sequence[str] | None = None
    ) -> None:
        super().__init__(path)
        self.unreadable: dict[str, str] = {}
        #: What was repaired, by the number of the row.
        self.repairs: dict[int, str] = {}
        self._offsets = array("q")
        csv.field_size_limit(_LONGEST_CELL)
        self._content = _in_utf8(path, encoding)
        with self._open() as stream:
            head = list(islice(filter(bytes.strip, stream), _TRIED))
            if not head:
                raise UserError(path, "the file is empty")
            stream.seek(self._start)
            if match := _SEPARATOR.fullmatch(_decoded(head[0]).strip()):
                while not stream.readline().strip():
                    pass
            self._delimiter = delimiter or (match[1] if match else _delimiter_of(head))
            self._width = 0
            self.columns = unlike(columns or self._header(stream))
            self._width = len(self.columns)
            self._find_rows(stream, is_given=encoding is not None)
        if not len(self):
            raise UserError(path, "a header and no row")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row; a ``BadSampleError`` where it has more cells than there are columns, or is not UTF-8."""
        with self._open() as stream:
            stream.seek(self._offsets[number])
            cells, _ = self._record(stream, stream.readline())
        if any(cell.strip() for cell in cells[self._width :]):
            found = f"{len(cells)} cells for {self._width} columns; a text with a {self._delimiter!r} in it needs quotes around it"
            raise BadSampleError(f"row of too many cells: {found}")
        for cell in cells:
            check_utf8(cell)
        cells += [""] * (self._width - len(cells))
        return {name: None if cell.strip() in _NOTHING else cell for name, cell in zip(self.columns, cells, strict=False)}

    def _open(self) -> BinaryIO:
        stream: BinaryIO = open(self.path, "rb") if self._content is None else io.BytesIO(self._content)  # noqa: SIM115
        self._start = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        stream.seek(self._start)
        return stream

    def _header(self, stream: BinaryIO) -> list[str]:
        """The names of the columns, from the first line that is not blank."""
        while not (line := stream.readline()).strip():
            if not line:
                raise UserError(self.path, "a first line and no header")
        names = [check_utf8(name).strip() for name in self._record(stream, line)[0]]
        if image := next(filter(IMAGE_NAME.search, names), None):
            hint = "--columns NAME… names the columns of a file without one"
            raise UserError(self.path, f"its first line names an image, '{image[:80]}'", "a header", hint)
        return names

    def _find_rows(self, stream: BinaryIO, is_given: bool) -> None:
        """The offset of every row; the encoding is either given, or must be right in each."""
        offset, wrong = stream.tell(), list[bytes]()
        while line := stream.readline():
            if line.strip():
                cells, repair = self._record(stream, line)
                end = stream.tell()
                if len(cells) < self._width and not repair:
                    repair = "row with fewer cells than columns, the last of them empty"
                if repair:
                    self.repairs[len(self._offsets)] = repair
                self._offsets.append(offset)
                try:
                    line.decode()
                except UnicodeDecodeError:
                    wrong.append(line)
            else:
                end = offset + len(line)
            offset = end
        if wrong and not is_given:
            found = f"{len(wrong):,} lines that are not UTF-8, such as {wrong[0].strip()[:60]!r}"
            hint = "--encoding cp1252 reads what Excel and Windows write, --encoding utf-8 leaves those rows out"
            raise UserError(self.path, found, "UTF-8, or an --encoding", hint)

    def _record(self, stream: BinaryIO, line: bytes) -> tuple[list[str], str]:
        """The cells of the row that begins with a line just read, and what was repaired; the stream then stands behind the row."""
        if b'"' not in line:
            return _plain(line, self._delimiter), ""
        behind = stream.tell()
        for quoting in _QUOTINGS if b'\\"' in line else _QUOTINGS[:1]:
            taken = [line]
            with suppress(csv.Error):
                cells = next(
                    csv.reader(_lines(stream, taken), delimiter=self._delimiter, skipinitialspace=True, strict=True, **quoting)
                )
                if len(taken) == 1 or len(cells) == self._width or not self._width:
                    return cells, ""
            stream.seek(behind)
        return _plain(line, self._delimiter), "quotes that do not match taken as they stand"


def unlike(names: Sequence[str]) -> list[str]:
    """Names of columns of which each is another and none is empty."""
    count = Counter[str]()
    found = []
    for place, name in enumerate(names, 1):
        name = name or f"column {place}"
        count[name] += 1
        found.append(name if count[name] == 1 else f"{name} {count[name]}")
    return found if len(set(found)) == len(found) else [f"{name} in column {place}" for place, name in enumerate(names, 1)]


def _lines(stream: BinaryIO, taken: list[bytes]) -> Iterator[str]:
    yield _decoded(taken[0])
    while line := stream.readline():
        taken.append(line)
        yield _decoded(line)


def _decoded(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _plain(line: bytes, delimiter: str) -> list[str]:
    return [cell.lstrip(" ") for cell in _decoded(line).rstrip("\r\n").split(delimiter)]


def _delimiter_of(head: Sequence[bytes]) -> str:
    """The delimiter that gives most of the first lines as many cells as the first; of those, the one with most names of images."""

    def cells(line: bytes, delimiter: str) -> list[str]:
        with suppress(csv.Error):
            return next(csv.reader([_decoded(line)], delimiter=delimiter, skipinitialspace=True))
        return _plain(line, delimiter)

    def fit(delimiter: str) -> tuple[float, int, int]:
        rows = [cells(line, delimiter) for line in head]
        width = len(rows[0])
        images = sum(any(IMAGE_NAME.search(cell.strip()) for cell in row) for row in rows)
        return (sum(len(row) == width for row in rows) / len(rows) if width > 1 else 0.0), images, width

    return max(DELIMITERS, key=fit)


def _in_utf8(path: Path, encoding: str | None) -> bytes | None:
    """The file in UTF-8 with line feeds; None where it has both, and need not be held."""
    if not path.is_file():
        raise UserError(path, "no such file")
    with open(path, "rb") as stream:
        start = stream.read(_START)
    encoding = encoding or next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if encoding is None and start[:200].count(b"\0") * 4 > len(start[:200]):  # UTF-16 without its mark
        encoding = "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
    is_other = encoding is not None and encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "utf-8-sig")
    if not is_other and (b"\n" in start or b"\r" not in start):
        return None
    try:
        text = path.read_bytes().decode(encoding if is_other and encoding else "utf-8", "strict" if is_other else "surrogateescape")
    except LookupError as error:
        raise UserError(
            "--encoding", f"'{encoding}'", "an encoding that Python knows, such as cp1252, latin-1 or utf-16"
        ) from error
    except UnicodeError as error:
        raise UserError(path, f"cannot be read as {encoding} ({error})"[:200], hint="--encoding says which it is") from error
    if "\n" not in text:  # of an old Macintosh
        text = text.replace("\r", "\n")
    return text.encode("utf-8", "surrogateescape")
