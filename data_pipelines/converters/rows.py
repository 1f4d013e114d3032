"""Rows of a JSON list or of a JSON Lines file; of the latter only byte offsets are held, so that millions of rows fit."""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

from data_pipelines.decoding import BadSampleError
from umm_zoo.errors import UserError

_LAYOUTS = "a JSON list of objects, or JSON Lines"


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(path, f"cannot be parsed ({error})") from error


class Rows:
    """Rows by number of one file: a JSON list of objects, or JSON Lines (recognised by the first character, not the suffix)."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(path, "no such file")
        self.path = path
        self.unreadable: dict[str, str] = {}
        self._rows: list[Any] = []
        self._offsets = array("q")
        with open(path, "rb") as stream:
            head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head:
            raise UserError(path, "the file is empty")
        if head[:1] not in (b"[", b"{"):
            raise UserError(path, f"a file that begins with {head[:20]!r}", _LAYOUTS)
        if head[:1] == b"[":
            self._rows = read_json(path)
        else:
            self._find_lines()
        if not len(self):
            raise UserError(path, "the list is empty")

    def __len__(self) -> int:
        return len(self._rows) or len(self._offsets)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row; a ``BadSampleError`` where the line cannot be parsed, or the row is no object."""
        row = self._rows[number] if self._rows else self._parse(self._offsets[number])
        if not isinstance(row, dict):
            raise BadSampleError(f"row is no object: a {type(row).__name__}")
        return row

    def fingerprint(self) -> str:
        """SHA-256 of the file, by which a conversion that goes on knows that it is still the same one."""
        with open(self.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _find_lines(self) -> None:
        offset = 0
        with open(self.path, "rb") as stream:
            for line in stream:
                if line.strip():
                    self._offsets.append(offset)
                offset += len(line)
        if len(self._offsets) > 1:
            try:
                self._parse(self._offsets[0])
            except BadSampleError:  # an indented object over many lines, not JSON Lines
                raise UserError(self.path, "one object", _LAYOUTS) from None

    def _parse(self, offset: int) -> Any:
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            line = stream.readline()
        try:
            return json.loads(line.decode("utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadSampleError(f"line cannot be parsed: {str(error)[:120]}") from error
