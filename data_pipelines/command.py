"""Command lines of this package: parsers that refuse in one line, and user errors as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from umm_zoo.errors import UserError, escape_output, user_errors

T = TypeVar("T")

SHARDS = "tar files, folders, globs, {000..015} ranges or addresses"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that wraps the paragraphs of a description, and leaves its examples and lists as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if "\n " in f"\n{part}" else fill(part, width, indent) for part in text.split("\n\n"))


class Parser(argparse.ArgumentParser):
    """Parser of ``python -m data_pipelines.NAME``; a wrong command line is one line and exit code 2.

    ``doc`` is the docstring of the command's module: "``python -m data_pipelines.NAME …``: what it is"; ``--help`` shows it.
    """

    def __init__(self, doc: str | None) -> None:
        usage, _, text = (doc or "").replace("\n::\n", "").replace("::\n", ":\n").partition("``: ")
        prog = " ".join(usage.strip("`").split()[:3])
        super().__init__(prog=prog, description=text[:1].upper() + text[1:].replace("``", ""), formatter_class=_Formatter)

    def format_help(self) -> str:
        """The text of ``--help``, which any terminal takes."""
        escape_output()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print the line and leave."""
        sys.stderr.write(f"error: {message} (--help lists every option)\n")
        raise SystemExit(2)


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text:.40}, expected a whole number from {least} on")
        return int(text)

    return parse


def share(text: str) -> float:
    """The type of an option that takes shares from 0 to below 1."""
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {text}, expected a number from 0 to below 1")


@dataclass(frozen=True)
class Portion:
    """Part ``number`` of ``count`` of a job's work, the parts of which are done by as many processes, on one machine or several."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """The neighbouring items that are this part's; each item is of exactly one part, whatever their number."""
        first, last = (len(items) * place // self.count for place in (self.number - 1, self.number))
        return items[first:last]


def portion(text: str) -> Portion:
    """The type of an option that takes ``K/N``."""
    numbers = [int(word) if word.isdecimal() and len(word) < 10 else 0 for word in text.split("/")]
    if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise argparse.ArgumentTypeError(f"found {text:.40}, expected K/N with K from 1 to N, such as 2/8")
    return Portion(*numbers)


def add_part(parser: argparse.ArgumentParser) -> None:
    """The option ``--part`` of a command whose work may be shared out."""
    what = "do part K of N, of a job array (in SLURM: $((SLURM_ARRAY_TASK_ID+1))/$SLURM_ARRAY_TASK_COUNT)"
    parser.add_argument("--part", type=portion, default=Portion(1, 1), metavar="K/N", help=what)


def run(main: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Run a command on its parsed command line; returns the exit code: 2 for a user error, 130 for Ctrl-C."""
    escape_output()
    with user_errors(getattr(arguments, "traceback", False)) as outcome:
        try:
            main(arguments)
        except OSError as error:
            raise UserError(error.filename or "", error.strerror or str(error)) from error
        except KeyboardInterrupt:
            sys.stderr.write("\nstopped; the same command goes on with the first unfinished shard\n")
            outcome.code = 130
    return outcome.code
