"""Reading of ``logs/metrics.csv``. Nothing here imports torch."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

NAME = "metrics.csv"


@dataclass
class Log:
    """A log as it was read: its columns, ``(number of the line, row)`` of the sound rows, and the lines that are none."""

    columns: list[str] = field(default_factory=lambda: ["step"])
    rows: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    damaged: list[bytes] = field(default_factory=list)


def read_log(file: Path) -> Log:
    """Read a log; a row has as many values as there are columns, a step, and numbers. Without a sound header there is no row."""
    text = file.read_bytes() if file.is_file() else b""
    *lines, cut = text.split(b"\n")
    header = _fields(lines[0]) if lines else None
    if header is None or "step" not in header or len(set(header)) < len(header) or "" in header:
        return Log(damaged=[line for line in [*lines, cut] if line.strip()])
    log = Log(header, damaged=[cut] if cut.strip() else [])
    for number, line in enumerate(lines[1:]):
        values = _fields(line)
        row = dict(zip(header, values, strict=True)) if values is not None and len(values) == len(header) else {}
        if row.get("step", "").isdecimal() and all(_is_number(value) for value in row.values()):
            log.rows.append((number, row))
        elif line.strip():
            log.damaged.append(line)
    return log


def _fields(line: bytes) -> list[str] | None:
    try:
        return next(csv.reader([line.decode("utf-8").strip()], strict=True), None)
    except (UnicodeDecodeError, csv.Error):
        return None


def _is_number(text: str) -> bool:
    try:
        return not text or not math.isnan(float(text)) or text.lower() == "nan"
    except ValueError:
        return False
