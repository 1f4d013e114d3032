"""Files of a user that benchmarks read: prompts and questions as their releases give them, and folders of images."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umm_zoo.errors import UserError, printable

#: Files that ship with the package; ``NOTICE`` beside them says whose they are.
SHIPPED = Path(__file__).parent / "prompts"
#: Suffixes of images that a name without one may have.
SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG", ".JPEG")


def needed(name: str, value: str | None, what: str) -> Path:
    """The path of a setting that is needed.

    Raises:
        UserError: it is not given, or nothing is there; ``what`` says what is needed.
    """
    if not value:
        raise UserError(name, "nothing", f"{name}=PATH, {what}")
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(name, f"'{value}', which is not there", what)
    return path


def rows_in(name: str, path: Path, keys: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """(name, row) of every row of a JSON list, a JSON map of rows, or a JSONL file; names are keys of the map, or numbers from 1.

    Args:
        name: of the setting, for messages.
        path: the file.
        keys: that every row must have.

    Raises:
        UserError: the file cannot be read, is of another form, holds no rows, or a row lacks a key.
    """
    found = json_in(name, path)
    if isinstance(found, dict) and all(key in found for key in keys) and keys:
        found = [found]  # a file of a single line
    if isinstance(found, list):
        found = {str(number): row for number, row in enumerate(found, 1)}
    if not isinstance(found, dict) or not found:
        raise UserError(f"{name}: {path}", "no rows", "a list or a map of them, or one per line")
    for key, row in found.items():
        if not isinstance(row, dict) or (missing := [own for own in keys if own not in row]):
            lacks = "no map" if not isinstance(row, dict) else f"none of {', '.join(missing)}"
            raise UserError(f"{name}: {path}: row {key}", lacks, f"a row with {', '.join(keys)}")
    return list(found.items())


def json_in(name: str, path: Path) -> Any:
    """What a JSON file holds, or a JSONL file as a list.

    Raises:
        UserError: it cannot be read.
    """
    text = text_of(name, path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    as_lines = path.suffix.lower() == ".jsonl"
    try:
        if not as_lines:
            return json.loads(text)
    except (ValueError, RecursionError) as error:
        as_lines = len(lines) > 1 and _is_row(lines[0][1])  # releases call files of lines .json, too
        if not as_lines:
            raise UserError(f"{name}: {path}", f"no JSON ({printable(str(error))})", "the file of the release") from error
    found = []
    for number, line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: {path}: line {number}", f"no JSON ({printable(str(error))})", "an object per line") from error
    return found


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def csv_rows(name: str, path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a line of names.

    Raises:
        UserError: the file cannot be read, or lacks a column or every row.
    """
    reader = csv.DictReader(io.StringIO(text_of(name, path), newline=""))
    try:
        rows = [{key: value or "" for key, value in row.items() if key is not None} for row in reader]
    except csv.Error as error:
        raise UserError(f"{name}: {path}", f"no CSV ({error})", "the file of the release") from error
    if missing := [key for key in keys if key not in (reader.fieldnames or ())]:
        raise UserError(f"{name}: {path}", f"no column {', '.join(missing)}", f"the columns {', '.join(keys)}")
    if not rows:
        raise UserError(f"{name}: {path}", "no rows", "one per question")
    return rows


def text_of(name: str, path: Path) -> str:
    """A text file in UTF-8, with or without a mark.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"{name}: {path}", f"no readable file ({reason})", "a text file") from error


def image_files(name: str, folder: Path, names: Mapping[str, Iterable[str]]) -> dict[str, Path]:
    """The image of each item in a folder.

    Args:
        name: of the setting, for messages.
        folder: of the images.
        names: by item, where its image may lie below the folder; a suffix may be left out.

    Raises:
        UserError: some are not there.
    """
    found = {}
    for item, own in names.items():
        places = (folder / f"{place}{suffix}" for place in own for suffix in SUFFIXES)
        if (path := next((path for path in places if path.is_file()), None)) is not None:
            found[item] = path
    if missing := [item for item in names if item not in found]:
        first = next(iter(names[missing[0]]))
        raise UserError(
            f"{name}: {folder}", f"no image {first}; {len(missing)} of {len(names)} are missing", "the release's images"
        )
    return found


def plain_key(text: str) -> str:
    """A key of an item, of letters, digits, ``-`` and ``_``."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)
