"""``logs/metrics.csv`` of a run: a row per logging, on the disk at once, readable whatever becomes of it."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from umm_zoo.checkpoints.plain_files import write_whole
from umm_zoo.errors import note
from umm_zoo.training.log_file import NAME, read_log

#: Lines of a log that are no rows, as they were found.
DAMAGED = "metrics.damaged.csv"


class MetricsLog(Logger):
    """Logger that appends each row in one go; a row with a new column makes the file again, under another name, and renames it.

    Lightning's own ``CSVLogger`` holds rows back, deletes the file when it is opened again, and rewrites it in place.

    Args:
        folder: of ``metrics.csv``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / NAME
        self._columns: list[str] = []
        self._num_rows = 0
        self._stream: TextIO | None = None

    @property
    def name(self) -> str:
        """Nothing: a run folder holds one run."""
        return ""

    @property
    def version(self) -> str:
        """Folder of the logs."""
        return self.file.parent.name

    @property
    def save_dir(self) -> str:
        """Folder of the logs."""
        return str(self.file.parent)

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        """Nothing: the experiment lies beside the logs."""

    @property
    def num_rows(self) -> int:
        """Rows that the file has now."""
        return self._num_rows

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        self._open()
        row = {**metrics, "step": self._num_rows if step is None else step}
        if not row.keys() <= set(self._columns):
            self._close()
            log = read_log(self.file)
            self._columns = sorted({*log.columns, *row})
            self._write([found for _, found in log.rows])
            self._open()
        assert self._stream is not None
        self._stream.write(_line([row.get(column, "") for column in self._columns]))
        self._stream.flush()
        self._num_rows += 1

    @rank_zero_only
    def rewind(self, step: int, lines: int | None = None) -> None:
        """Keep the rows of before ``step``, of the first ``lines`` of them; what is no row is set aside, what is gone is said."""
        self._close()
        log = read_log(self.file)
        if log.damaged:
            aside = self.file.with_name(DAMAGED)
            with aside.open("ab") as stream:
                stream.write(b"".join(line + b"\n" for line in log.damaged))
                stream.flush()
                os.fsync(stream.fileno())
            note(f"{len(log.damaged)} damaged lines of {self.file} now stand in {aside}")
        kept = [row for number, row in log.rows if int(row["step"]) < step and (lines is None or number < lines)]
        if lines is not None and (missing := lines - len(kept) - len(log.damaged)) > 0:
            note(f"{missing} rows that {self.file} had at the checkpoint are gone")
        self._columns = log.columns
        self._write(kept)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        values = [self._columns, *([row.get(column, "") for column in self._columns] for row in rows)]
        write_whole(self.file, "".join(map(_line, values)))
        self._num_rows = len(rows)

    def _open(self) -> None:
        if self._stream is None:
            if not self._columns:  # nobody has looked into the file
                self.rewind(sys.maxsize)
            self._stream = self.file.open("a", encoding="utf-8", newline="")

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def sync(self) -> None:
        """Flush it to the disk, before a checkpoint counts its rows."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def finalize(self, status: str) -> None:
        """Close the file."""
        self._close()


def _line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
