"""Rows of a JSON list or of a JSON Lines file; of the latter only byte offsets are held, so that millions of rows fit."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from data_pipelines.decoding import LENIENT, BadSampleError, check_utf8, decode_text, parse_json, unique_keys
from data_pipelines.tasks import IMAGE_TYPES
from umm_zoo.errors import UserError

_LAYOUTS = "a JSON list of objects, or JSON Lines"
_BLANKS = re.compile(r"[ \t\r\n]*")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]|[^"\[\]{},\s]+', re.DOTALL)
_LONGEST = 1 << 30
_TRIED = 100  # lines that are looked at to tell a list from lines
IMAGE_NAME = re.compile(rf"^[^\n]+\.({'|'.join(IMAGE_TYPES)})$", re.IGNORECASE)


@dataclass(frozen=True)
class Unusable:
    """Element of a JSON file that cannot be used, and why."""

    reason: str


def read_json(path: Path, depth: int = 0) -> Any:
    """The content of a JSON file; a user error where the file as a whole cannot be parsed.

    Where the parser refuses it, elements down to ``depth`` (1: those of the list or object that the file is) are parsed one by one,
    and an `Unusable` stands in the place of each that is not UTF-8, nested too deep, or refused for another reason of its own.
    """
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    with suppress(BadSampleError):
        return parse_json(check_utf8(text), finite=False)
    try:
        value, place = _element(text, _next(text, 0), depth)
        if (place := _next(text, place)) != len(text):
            raise JSONDecodeError("Extra data", text, place)
    except (JSONDecodeError, BadSampleError) as error:
        raise UserError(path, f"cannot be parsed ({error})") from error
    if isinstance(value, Unusable):
        raise UserError(path, f"cannot be parsed ({value.reason})")
    return value


def _element(text: str, place: int, depth: int) -> tuple[Any, int]:
    """The value that begins at ``place``, and where it ends."""
    opened = text[place : place + 1]
    if depth and opened in ("[", "{"):
        return _elements(text, place, depth)
    try:
        value, end = LENIENT.raw_decode(text, place)
        check_utf8(json.dumps(value, ensure_ascii=False))
        return value, end
    except JSONDecodeError:  # a file that is no JSON, or ends early: nobody knows where the next element begins
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, BadSampleError) else f"json cannot be parsed ({type(error).__name__}: {error})"
        return Unusable(reason[:200]), _end(text, place)


def _elements(text: str, place: int, depth: int) -> tuple[Any, int]:
    """A list or an object, element by element."""
    is_object = text[place] == "{"
    found: list[tuple[str, Any]] = []
    place = _next(text, place + 1)
    while text[place : place + 1] != ("}" if is_object else "]"):
        name = ""
        if found:
            place = _next(text, place, ",")
        if is_object:
            name, place = LENIENT.raw_decode(text, place)
            place = _next(text, place, ":")
        value, place = _element(text, place, depth - 1)
        found.append((name, value))
        place = _next(text, place)
    return (unique_keys(found) if is_object else [value for _, value in found]), place + 1


def _next(text: str, place: int, mark: str = "") -> int:
    """The place of the next character that is not blank, behind a ``mark`` that must stand there."""
    if not text.startswith(mark, place):
        raise JSONDecodeError(f"Expecting '{mark}'", text, place)
    return _BLANKS.match(text, place + len(mark)).end()  # type: ignore[union-attr]  # it matches nothing, too


def _end(text: str, place: int) -> int:
    """Where the element ends that begins at ``place``, by its brackets alone."""
    depth = 0
    for token in _TOKEN.finditer(text, place):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth <= 0:
            return token.end()
    raise JSONDecodeError("Unterminated element", text, place)


def texts_in(value: Any) -> Iterator[str]:
    """The texts of a value of a row, however deep in lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def names_in(value: Any) -> set[int]:
    """Hashes of the names of images in a value of a row."""
    return set(map(hash, filter(IMAGE_NAME.search, texts_in(value))))


class RowFile(ABC):
    """Base class of the rows of one file, by number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: set[int] | None = None  # hashes: millions of names take a tenth of the room

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row; a ``BadSampleError`` where it cannot be used."""

    def names_file(self, name: str) -> bool:
        """Whether a value of any row is this name of an image."""
        if self._names is None:
            self._names = set()
            for number in range(len(self)):
                with suppress(BadSampleError):
                    self._names |= names_in(self[number])
        return hash(name) in self._names

    def fingerprint(self) -> str:
        """SHA-256 of the file, by which a conversion that goes on knows that it is still the same one."""
        with open(self.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


class Rows(RowFile):
    """Rows by number of one file: a JSON list of objects, or JSON Lines (recognised by its first lines, not by the suffix)."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(path, "no such file")
        super().__init__(path)
        self.unreadable: dict[str, str] = {}
        self._rows: list[Any] = []
        self._offsets = array("q")
        self._find_lines()
        if not self._offsets:
            raise UserError(path, "the file is empty")
        starts = [self._line(offset)[:4096].removeprefix(b"\xef\xbb\xbf").strip() for offset in self._offsets[:_TRIED]]
        has_objects = any(start.startswith(b"{") for start in starts[1:] or starts)
        self._is_list = starts[0].startswith(b"[") and not (has_objects and self._is_row(0))
        if self._is_list:
            self._offsets, self._rows = array("q"), read_json(path, depth=1)
        elif not has_objects and not starts[0].startswith(b"{"):
            raise UserError(path, f"a file that begins with {starts[0][:20]!r}", f"{_LAYOUTS}, in UTF-8")
        elif starts[0] == b"{":  # indented, over many lines
            self._offsets, self._rows = array("q"), [self._only_object()]
        if not len(self):
            raise UserError(path, "the list is empty")

    def _only_object(self) -> dict[str, Any]:
        try:
            found = read_json(self.path)
        except UserError as error:
            raise UserError(self.path, "one object over many lines, or several", _LAYOUTS) from error
        return dict(found)

    def check_wrapped(self, *keys: str) -> None:
        """Refuse a file of one object that holds the list of rows, and is no row itself, for it has none of the ``keys`` of one."""
        if len(self) > 1 or self._is_list:
            return
        with suppress(BadSampleError):
            row = self[0]
            lists = [key for key, value in row.items() if isinstance(value, list) and all(isinstance(one, dict) for one in value)]
            if lists and not row.keys() & set(keys):
                found = f"one object with a list of {len(row[lists[0]])} under '{lists[0]}'"
                raise UserError(self.path, found, _LAYOUTS, f"`jq .{lists[0]} {self.path.name}` gives the list")

    def __len__(self) -> int:
        return len(self._rows) or len(self._offsets)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row; a ``BadSampleError`` where it cannot be parsed, or is no object."""
        row = self._rows[number] if self._rows else self._parse(self._offsets[number])
        if isinstance(row, Unusable):
            raise BadSampleError(row.reason)
        if not isinstance(row, dict):
            raise BadSampleError(f"row is no object: a {type(row).__name__}")
        return row

    def _find_lines(self) -> None:
        offset = 0
        with open(self.path, "rb") as stream:
            for line in stream:
                if line.strip():
                    self._offsets.append(offset)
                offset += len(line)

    def _is_row(self, line: int) -> bool:
        """Whether a line is one element, by its brackets."""
        text = self._line(self._offsets[line]).decode("utf-8-sig", "replace").strip()
        try:
            return _end(text, 0) == len(text)
        except JSONDecodeError:
            return False

    def _line(self, offset: int) -> bytes:
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return stream.readline()

    def _parse(self, offset: int) -> Any:
        return parse_json(decode_text(self._line(offset), _LONGEST), finite=False)
