"""Errors that end in one line for the person who can mend them."""

from __future__ import annotations

import difflib
import errno
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval

#: Numbers of constructors, by the limits that the check of an experiment refuses them at.
Weight = Annotated[float, Interval(ge=0, lt=math.inf)]
Positive = Annotated[float, Interval(gt=0, lt=math.inf)]
Finite = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]
Share = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Interval(ge=1)]
Natural = Annotated[int, Interval(ge=0)]

#: Errors of the system over texts that name no place at all; whoever asks whether a file is there meets them.
NO_PATHS = (errno.ENAMETOOLONG, errno.ELOOP)
#: What constructors and libraries raise over values that they refuse; a user error where it is known whose values they were.
REFUSALS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


@dataclass(frozen=True)
class Problem:
    """One thing that a user can mend.

    Args:
        where: dotted path in an experiment, file, or key of a sample.
        found: what stands there; a whole sentence where ``expected`` is empty.
        expected: what should stand there.
        hint: how to get on.
    """

    where: str
    found: str
    expected: str = ""
    hint: str = ""

    def __str__(self) -> str:
        said = f"found {self.found}, expected {self.expected}" if self.expected else self.found
        text = f"{self.where}: {said}" if self.where else said
        return f"{text}; {self.hint}" if self.hint else text


class UserError(ValueError):
    """An error that a user can mend: a misspelt key, a damaged shard, a sample too long for the model, unfit weights.

    Commands print it as one line per problem, without a traceback, and exit with code 2. Raise it for nothing else: every other
    error is taken for a bug and keeps its traceback. Who catches it may know more: ``locate`` adds the file or the sample's key.

        raise UserError("data.batch_size", "0", "a positive whole number")
        raise UserError("", "3,000 tokens", "at most 2,048", row=4)      # the row of a batch, whose key the command knows

    Args:
        where: dotted path in the experiment, file, or key of a sample; empty where only the caller knows.
        found: what stands there (a whole sentence where ``expected`` is empty), or several problems below ``where``.
        expected: what should stand there.
        hint: how to get on.
        file: the experiment file or run, for the front of every line.
        row: row of the batch in work that it is about.
        advice: what to do next, for a line of its own below all others.
        message: text that ends in a line of ``to_json``, in place of all others: torch raises the error of a loader's worker again
            as ``UserError(message=…)``, with the worker's traceback for the text.
    """

    def __init__(
        self,
        where: str | Path = "",
        found: str | Sequence[Problem] = "",
        expected: str = "",
        hint: str = "",
        *,
        file: str | Path = "",
        row: int | None = None,
        advice: str = "",
        message: str = "",
    ) -> None:
        self.row, self.advice = row, advice
        self.file = str(file) if isinstance(found, str) else str(where)
        self.problems = [Problem(str(where), found, expected, hint)] if isinstance(found, str) else list(found)
        if message:
            problems, self.file, self.row, self.advice = json.loads(message.strip().splitlines()[-1])
            self.problems = [Problem(*fields) for fields in problems]
        super().__init__(where, found)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> str:
        """Everything that it says, as one line."""
        return json.dumps([[astuple(problem) for problem in self.problems], self.file, self.row, self.advice])

    @property
    def message(self) -> str:
        """The text; that the class has this attribute tells torch which argument to raise a worker's error again with."""
        return str(self)

    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        """The text below the traceback: in a loader's worker the line that ``message`` needs."""
        return [self.to_json()] if multiprocessing.parent_process() else []

    def lines(self) -> list[str]:
        """``<file>: <where>: found …, expected …; <hint>``, one line per problem."""
        lines = [f"{self.file}: {problem}" if self.file else str(problem) for problem in self.problems]
        return [printable(" ".join(line.split())) for line in lines]

    def locate(self, file: str | Path = "", place: str = "", keys: Sequence[str] = (), advice: str = "") -> None:
        """Add what the one who caught it knows.

        Args:
            file: the experiment file or run, for the front of every line.
            place: part of the experiment (``data``, ``method`` …) where the error names none.
            keys: of the batch in work; that of ``row`` is named behind the place.
            advice: what to do next, where the error says nothing about it.
        """
        if self.row is not None:
            key = keys[self.row] if self.row < len(keys) else f"row {self.row}"
            place = f"{place}: {key}" if place else key
        self.problems = [problem if problem.where else replace(problem, where=place) for problem in self.problems]
        self.file = self.file or str(file)
        self.advice, self.row = self.advice or advice, None


def printable(text: str) -> str:
    """``text`` in one line that any file and any terminal takes: what does not print, or is no UTF-8, is escaped.

    Names and keys come from others' files, and must not move a terminal's cursor or look like a line of this program.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def lasting(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 20 s`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def say(text: str, stderr: bool = False) -> None:
    """Print one line, at once, whatever paths and names of others it holds."""
    print(printable(text), file=sys.stderr if stderr else sys.stdout, flush=True)


def note(text: str) -> None:
    """Print a remark on stderr, see `say`."""
    say(f"note: {text}", stderr=True)


@contextmanager
def locating(file: str | Path = "", place: str = "", refusals: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Add a place to the user errors that pass through (see ``UserError.locate``), and make user errors of ``refusals``."""
    try:
        yield
    except UserError as error:
        error.locate(file, place)
        raise
    except refusals as error:
        refused = UserError(place, str(error) or type(error).__name__)
        refused.locate(file)
        raise refused from error


def several(where: str, values: Any, kind: type = str) -> None:
    """Refuse a single text (a file, a tensor) where a list belongs, which would be taken letter by letter (row by row).

    Raises:
        UserError: ``values`` is no list, or holds something else than ``kind``.
    """
    if isinstance(values, (str, bytes, os.PathLike, Mapping)) or not isinstance(values, Iterable):
        raise UserError(where, f"a single {type(values).__name__}", f"a list of {kind.__name__}", "put it in brackets")
    odd = next((value for value in values if not isinstance(value, kind)), None) if isinstance(values, Sequence) else None
    if odd is not None or hasattr(values, "ndim"):
        raise UserError(where, f"a {type(values if odd is None else odd).__name__}", f"a list of {kind.__name__}")


#: Exit code of a command that a user error has ended.
USER_ERROR = 2


class Outcome:
    """The exit code of a command."""

    code = 0


def escape_output() -> None:
    """Let a terminal or a file that is not UTF-8 get escapes, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def user_errors(show_traceback: bool = False) -> Iterator[Outcome]:
    """Print a ``UserError`` as ``error: …`` lines and make the exit code 2; Ctrl-C outside training makes it 130.

    What a terminal's encoding cannot show is printed as escapes, inside too.
    """
    escape_output()
    outcome = Outcome()
    try:
        yield outcome
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and error.errno not in NO_PATHS:
            raise
        if show_traceback:
            traceback.print_exc()
        if isinstance(error, OSError):
            error = UserError(str(error.filename), f"no path of this system ({error.strerror})", "a file or folder")
        print_error(error)
        outcome.code = USER_ERROR
    except KeyboardInterrupt:
        print("stopped by SIGINT outside training; no checkpoint was saved", file=sys.stderr)
        outcome.code = 128 + signal.SIGINT


def print_error(error: UserError) -> None:
    """The lines of an error on stderr, and below them its advice."""
    print(*(f"error: {line}" for line in error.lines()), *filter(None, [error.advice]), sep="\n", file=sys.stderr, flush=True)


def nearest(word: str, known: Iterable[Any]) -> str | None:
    """The known word that ``word`` most likely misspells."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(word: str | None, known: Iterable[Any] | None = None) -> str:
    """A hint at the right word: ``word`` itself, or the one of ``known`` that it misspells; empty where there is none."""
    meant = word if word is None or known is None else nearest(word, known)
    return f"did you mean '{meant}'?" if meant else ""
