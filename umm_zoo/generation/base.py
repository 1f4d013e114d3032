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
    """Command to a finished run, with one line of help; ``prints_question`` puts the question before a printed answer."""

    help: str
    prints_question: bool = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027 - a command may have none
        """Options of this command alone."""

    @abstractmethod
    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """The words behind the command as requests; a ``UserError`` where they make no sense."""

    def read(self, file: Path, arguments: argparse.Namespace) -> list[Request]:
        """The lines of a batch file as requests; a ``UserError`` where one is none."""
        return read_requests(file)

    @abstractmethod
    def run(self, model: Model, requests: list[Request], arguments: argparse.Namespace) -> list[Result]:
        """Results of one batch; a ``UserError`` where the method lacks the capability, or a request does not suit it."""
