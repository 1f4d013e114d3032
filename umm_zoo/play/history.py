"""What was made on the page, with all its settings: folders as ``generate --out`` writes them, found again by whoever looks."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umm_zoo.checkpoints.plain_files import writing
from umm_zoo.generation import COMMANDS
from umm_zoo.generation.images import open_image
from umm_zoo.generation.results import LINES, ResultsFolder
from umm_zoo.play.commands import RunWords, command_words, shell_line

#: Folder of copies of the input images.
INPUTS = "inputs"
INSTEAD = "--history DIR with a folder that can be written"
_CALL = re.compile(r"\d{4}-\d\d-\d\d-\d{6}(-\d+)?")
_FILE = re.compile(r"[\w.-]+\.(png|jpg|jpeg|webp|gif|bmp|tif|tiff|image)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One result.

    Args:
        folder: of the call that it was made in.
        row: its line of ``results.jsonl``.
    """

    folder: Path
    row: Mapping[str, Any]

    @property
    def images(self) -> list[Path]:
        """Files that were made; the last is the result, what stands before it is to read it against."""
        return [self.folder / name for name in self.row["files"]]

    @property
    def inputs(self) -> list[Path]:
        """Copies of the input images."""
        return [self.folder.parent / INPUTS / name for name in self.row["inputs"]]

    def line(self, run: RunWords) -> str:
        """The command that makes it again."""
        images = [str(path) for path in self.inputs]
        return shell_line(command_words(run, self.row["command"], images, self.row["question"], self.row["given"]))

    def settings(self) -> dict[str, Any]:
        """What it was made with, as far as it is known: what was set, and the run's own."""
        own = ("seed", "steps", "guidance", "image_guidance", "size", "max_new_tokens", "temperature")
        unset = self.row.get("own")
        row = {**(unset if isinstance(unset, dict) else {}), **{key: value for key, value in self.row.items() if value is not None}}
        return {name: row[name] for name in own if name in row}


class History:
    """History of a run, or of all that are tried on a page.

    Args:
        folder: of the entries; it is made when the first one comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, image: Path) -> Path:
        """A copy of an input image, under a name made of its bytes.

        Raises:
            UserError: it is no image, or the copy cannot be written.
        """
        open_image(image)
        name = hashlib.sha256(image.read_bytes()).hexdigest()[:16]
        suffix = image.suffix.lower() if _FILE.fullmatch(f"a{image.suffix}") else ".image"
        copy = self.folder / INPUTS / f"{name}{suffix}"
        with writing(copy, INSTEAD):
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                shutil.copyfile(image, copy)
        return copy

    def call(self, count: int) -> ResultsFolder:
        """The folder of a call that makes so many results.

        Raises:
            UserError: it cannot be written.
        """
        with writing(self.folder, INSTEAD):
            self.folder.mkdir(parents=True, exist_ok=True)
        return ResultsFolder(self.folder / time.strftime("%Y-%m-%d-%H%M%S"), count, {}, INSTEAD)

    def entries(self, most: int = 60) -> list[Entry]:
        """The newest ones, newest first."""
        found: list[Entry] = []
        for folder in sorted(self._calls(), key=lambda path: _place(path.name), reverse=True):
            found += reversed(entries_of(folder))
            if len(found) >= most:
                break
        return found[:most]

    def _calls(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from (path for path in self.folder.iterdir() if _CALL.fullmatch(path.name) and (path / LINES).is_file())

    def file(self, call: str, name: str) -> Path | None:
        """A file of a call, or of ``inputs``; None for everything else, whatever the names hold."""
        if not (_CALL.fullmatch(call) or call == INPUTS) or not _FILE.fullmatch(name):
            return None
        file = self.folder / call / name
        return file if file.is_file() and not file.is_symlink() else None


def entries_of(folder: Path) -> list[Entry]:
    """Entries of one call, in the order in which they were made; lines of others are left out."""
    found = []
    for line in (folder / LINES).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # being written, or damaged
        if isinstance(row, dict) and _is_ours(row):
            found.append(Entry(folder, row))
    return found


def _is_ours(row: Mapping[str, Any]) -> bool:
    names = [*row.get("inputs", [None]), *row.get("files", [None])]
    texts = isinstance(row.get("question"), str) and all(isinstance(name, str) for name in names)
    return texts and row.get("command") in COMMANDS and isinstance(row.get("given"), dict)


def _place(name: str) -> tuple[str, int]:
    """The order of calls: of one second by their number."""
    return name[:17], int(name[18:] or 1)
