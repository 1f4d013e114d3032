"""Base class of the commands of ``python -m umm_zoo.generate``. Nothing here imports torch."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from umm_zoo.generation.requests import Request, Result, read_requests

if TYPE_CHECKING:
    from umm_zoo.generation.model import Model


class Command(ABC):
    """One thing that a run can be asked to do.

    Attributes:
        help: one line.
        prints_question: put the question before a printed answer.
    """

    help: str
    prints_question: bool = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027 - a command may have none
        """Options of this command alone."""

    @abstractmethod
    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """The words behind the command as requests.

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
        """Do it for one batch.

        Raises:
            UserError: the method lacks the capability for it, or a request does not suit it.
        """
