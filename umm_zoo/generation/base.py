"""What the verbs of ``python -m umm_zoo.generate`` are made of. Nothing here imports torch before it is needed."""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from umm_zoo.errors import Problem, UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from umm_zoo.method import Method


@dataclass
class Request:
    """What is asked, about which images."""

    images: list[Path]
    question: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The images and the question, for messages."""
        return " ".join([*map(str, self.images), *([f"'{self.question}'"] if self.question else [])])


@dataclass
class Result:
    """What came of it: a text, or drawn images by name."""

    request: Request
    answer: str | None = None
    images: dict[str, Image.Image] = field(default_factory=dict)


@dataclass
class Model:
    """A method in evaluation mode, and how images become its inputs."""

    method: Method
    load_image: Callable[[Path], Tensor]
    device: str


class Verb(ABC):
    """One thing that a run can be asked to do.

    Attributes:
        help: one line.
        needs: the method's function without which it cannot be done.
        deed: what a method that lacks it cannot do; ``needs`` where that says it.
        prints_question: put the question before a printed answer.
    """

    help: str
    needs: str
    deed: str = ""
    prints_question: bool = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027 - a verb may have none
        """Options of this verb alone."""

    @abstractmethod
    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """The words behind the verb as requests.

        Raises:
            UserError: they make no sense.
        """

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """The lines of a batch file as requests.

        Raises:
            UserError: no such file, or a line is not a request.
        """
        return read_requests(file)

    @abstractmethod
    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Do it for one batch."""


def read_requests(file: Path, question: str | None = None) -> list[Request]:
    """Requests from a JSONL file.

    Args:
        file: one request per line.
        question: of the lines that have none; every line must then have an image. None where a question is needed.

    Raises:
        UserError: no such file, or a line is not a request.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(file, f"found no readable file ({error.strerror}), expected a JSONL file") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            images = row.get("images", [])
            asked = row["question"] if question is None else row.get("question", question)
            if not isinstance(asked, str) or not isinstance(images, list) or not (images or question is None):
                raise TypeError
            requests.append(Request([file.parent / image for image in images], asked))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            expected = '{"images": ["one.png", ...]' + (', "question": "..."}' if question is None else "}")
            raise UserError(file, [Problem(f"line {number}", f"'{line[:60]}'", expected)]) from None
    return requests
