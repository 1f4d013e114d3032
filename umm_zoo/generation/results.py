"""Files in which ``python -m umm_zoo.generate`` leaves its results."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from umm_zoo.callbacks.cards import Card, draw_cards
from umm_zoo.checkpoints.plain_files import writing
from umm_zoo.errors import printable
from umm_zoo.generation.images import open_image
from umm_zoo.generation.requests import Result, name_of

#: File of the results.
LINES = "results.jsonl"
INSTEAD = "--out DIR with a folder that can be written"
#: Results that the grid shows at most.
MAX_CARDS = 64


class ResultsFolder:
    """Folder of the results of one call, written as they come.

    ``results.jsonl`` has a line per result, in the order of the requests: input images, question, settings, answer, the files made,
    and what made them. Every image that was made is a file of its own; ``grid.png`` shows the first ones.

    Args:
        path: the folder; where it holds anything, a new one beside it, numbered on.
        count: number of results to come.
        about: what made them, for every line.
        instead: what to do where it cannot be written, for the error.
    """

    def __init__(self, path: Path, count: int, about: Mapping[str, Any], instead: str = INSTEAD) -> None:
        with writing(path, instead):
            self.path = _new_folder(path)
        self.about, self._instead = about, instead
        self._digits = max(3, len(str(count - 1)))
        self.count = 0
        self._cards: list[Card] = []

    def add(self, result: Result) -> None:
        """Save the images of a result, and then its line."""
        with writing(self.path, self._instead):
            self._add(result)

    def _add(self, result: Result) -> None:
        request, files = result.request, {}
        for name, image in result.images.items():
            files[name] = f"{self.count:0{self._digits}d}-{name.replace(' ', '-')}.png"
            image.save(self.path / files[name])
        made = next(iter(result.images.values()), None)
        row: dict[str, Any] = {
            "images": [name_of(image) for image in request.images],
            "question": request.question,
            **request.settings,
            **({"size": f"{made.height}x{made.width}"} if made else {}),
            "answer": result.answer,
            **({"similarities": result.similarities} if result.similarities else {}),
            **({"remark": result.remark} if result.remark else {}),
            "files": list(files.values()),
            **self.about,
        }
        with (self.path / LINES).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self.count += 1
        if len(self._cards) < MAX_CARDS:
            inputs = {printable(path.name): open_image(path) for path in request.images if isinstance(path, Path)}
            self._cards.append(Card(", ".join(inputs), request.question, result.answer, "", None, {**inputs, **result.images}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Draw the grid; a call that made nothing leaves no folder."""
        if self._cards:
            with writing(self.path, self._instead):
                draw_cards(self._cards, 192, 4).save(self.path / "grid.png")
        else:
            (self.path / LINES).unlink()
            self.path.rmdir()


def _new_folder(path: Path) -> Path:
    """A folder of this call alone, whatever others do meanwhile: ``path`` if it is new or empty, else numbered on."""
    path = path if path.name not in ("", "..") else path.resolve()
    if not path.name:
        raise NotADirectoryError(errno.EROFS, "the root", str(path))
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if not folder.exists() or (number == 1 and folder.is_dir() and not os.listdir(folder)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / LINES).touch(exist_ok=False)
                return folder
            except FileExistsError:
                continue  # another call was faster
        elif not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    raise AssertionError
