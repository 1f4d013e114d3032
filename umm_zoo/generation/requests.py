"""Requests to a finished run and their results. Nothing here imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from umm_zoo.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class Request:
    """Question or prompt, the images it is about, and a seed."""

    images: list[Path]
    question: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The images and the question, for messages."""
        return " ".join([*map(str, self.images), *([f"'{self.question}'"] if self.question else [])])


@dataclass
class Result:
    """Result of a request: a text, or images by name."""

    request: Request
    answer: str | None = None
    images: dict[str, Image.Image] = field(default_factory=dict)


def read_requests(file: Path, question: str | None = None) -> list[Request]:
    """Requests from the lines of a JSONL file; a ``UserError`` where one is none.

    Lines need a question, unless there is a ``question`` for those that have none; every line must then have an image.
    """
    requests = []
    for number, line in enumerate(read_lines(file, "a JSONL file"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            images = row.get("images", [])
            text = row["question"] if question is None else row.get("question", question)
            if not isinstance(text, str) or not isinstance(images, list) or not (images or question is None):
                raise TypeError
            requests.append(Request([file.parent / image for image in images], text))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            expected = '{"images": ["one.png", ...]' + (', "question": "..."}' if question is None else "}")
            raise UserError(f"{file}: line {number}", f"'{line[:60]}'", expected) from None
    return requests


def read_lines(file: Path, expected: str) -> list[str]:
    """The lines of a text file; a ``UserError`` where there is none."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(file, f"no readable file ({error.strerror})", expected) from error
