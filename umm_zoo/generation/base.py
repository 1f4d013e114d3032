"""Base class of the commands of ``python -m umm_zoo.generate``. Nothing here imports torch."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from umm_zoo.errors import UserError
from umm_zoo.generation.options import Option, checked_text, settings_in
from umm_zoo.generation.requests import Request, Result, check_keys, images_in, question_in, read_rows

if TYPE_CHECKING:
    from umm_zoo.generation.model import Model


def behind_options(words: Sequence[str]) -> list[str]:
    """Words of a command line of which none is taken for an option."""
    return ["--", *words] if any(word.startswith("-") for word in words) else list(words)


class Command(ABC):
    """Command to a finished run.

    Attributes:
        help: one line.
        options: settings of a request by name; they are options of the command line and keys of a batch file's lines.
        num_images: fewest and most images of a request.
        asks: whether a request has a text of its own.
        may_be_empty: whether that text may be.
        plain_files: whether a ``.txt`` file may hold a text per line.
        prints_question: whether the question stands before a printed answer.
        out: folder of the results where none is said.
    """

    help: ClassVar[str]
    options: ClassVar[Mapping[str, Option]]
    num_images: ClassVar[tuple[int, int]]
    asks: ClassVar[bool] = True
    may_be_empty: ClassVar[bool] = False
    plain_files: ClassVar[bool] = False
    prints_question: ClassVar[bool] = False
    out: ClassVar[str | None] = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The options; their values are checked by ``settings``."""
        for name, option in self.options.items():
            default = "" if option.default is None else f" (default: {option.default})"
            how: dict[str, Any] = {"action": "store_const", "const": True} if option.switch else {"metavar": option.metavar}
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=option.help + default, **how)
        parser.set_defaults(out=self.out)

    def settings(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """The settings of the command line; a ``UserError`` where one cannot be."""
        given = {name: getattr(arguments, name) for name in self.options}
        return settings_in(self.options, given, lambda name: f"--{name.replace('_', '-')}")

    def default_question(self, arguments: argparse.Namespace) -> str | None:
        """The text of a line without one; None where every line needs its own."""
        return None if self.asks else ""

    @abstractmethod
    def words(self, words: list[str], arguments: argparse.Namespace) -> list[tuple[list[Path], str]]:
        """Images and text of each request on the command line; a ``UserError`` where the words make no sense."""

    def line(self, images: Sequence[str], text: str) -> list[str]:
        """What stands on the command line for one request: ``words`` makes it of it again, whatever the text begins with."""
        return behind_options([*images, *([text] if self.asks else [])])

    def requests(self, words: list[str], arguments: argparse.Namespace) -> list[Request]:
        """The requests of the command line, or of the lines of its batch file.

        Raises:
            UserError: a word, a line or a setting cannot be used.
        """
        settings = self.settings(arguments)
        if arguments.batch is None:
            requests = [Request(images, text, dict(settings)) for images, text in self.words(words, arguments)]
        elif words:
            raise UserError("--batch", "further words beside a file", "the file alone, whose lines hold the requests")
        else:
            file = Path(arguments.batch)
            plain = self.plain_files and file.suffix.lower() == ".txt"
            requests = [self._request(row, file, place, settings, arguments) for place, row in read_rows(file, plain)]
        for request in requests:
            self.check(request, arguments.command)
        return requests

    def check(self, request: Request, place: str) -> None:
        """Refuse a text that is none, or is needed and empty, with a ``UserError`` at ``place`` where the request has none."""
        place = request.place or place
        if not checked_text(request.question, place, "a text").strip() and self.asks and not self.may_be_empty:
            raise UserError(place, "an empty question", "a text")

    def _request(
        self, row: dict[str, Any], file: Path, place: str, settings: dict[str, Any], arguments: argparse.Namespace
    ) -> Request:
        """One line."""
        check_keys(row, ["images", *(["question"] if self.asks else []), *self.options], place)
        given = {name: row[name] for name in self.options if row.get(name) is not None}
        own = {name: self.options[name].read(value, f"{place}: {name}") for name, value in given.items()}
        images, (least, most) = images_in(row, file.parent, place), self.num_images
        if not least <= len(images) <= most:
            expected = f"{least}" if least == most else f"{least} or more" if len(images) < least else f"at most {most}"
            raise UserError(f"{place}: images", f"{len(images)}", f"{expected} for {arguments.command}")
        return Request(images, question_in(row, self.default_question(arguments), place), {**settings, **own}, place)

    def options_of(self, method: Any) -> dict[str, Option]:
        """The settings that mean something to a method."""
        from umm_zoo.generation.abilities import refused

        return {name: option for name, option in self.options.items() if name not in refused(method)}

    @abstractmethod
    def possible(self, method: Any) -> bool:
        """Whether a method can do it."""

    @abstractmethod
    def run(self, model: Model, requests: list[Request]) -> list[Result]:
        """Results of a batch whose settings differ by their seeds alone.

        Raises:
            UserError: the method lacks the capability, or a request does not suit it.
        """
