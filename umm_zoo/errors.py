"""Errors that end in one line for the person who can mend them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One mistake of a user: where it stands, what was found, what is expected, what may have been meant."""

    where: str
    found: str
    expected: str
    meant: str | None = None

    def __str__(self) -> str:
        hint = f"; did you mean '{self.meant}'?" if self.meant else ""
        where = f"{self.where}: " if self.where else ""
        return f"{where}found {self.found}, expected {self.expected}{hint}"


class UserError(Exception):
    """A mistake that its author can mend: commands print one line per problem, without a traceback, and exit with code 2.

    Args:
        file: the experiment file, or whatever else is wrong.
        problems: what is wrong with it.
        advice: how to go on, for a line below them.
    """

    def __init__(self, file: str | Path, problems: Sequence[Problem | str] | str, advice: str = "") -> None:
        self.file, self.advice = str(file), advice
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """``<file>: <path>: found …, expected …; did you mean …?``, one line per problem."""
        return [f"{self.file}: {' '.join(str(problem).split())}" for problem in self.problems]


def nearest(word: str, known: Iterable[Any]) -> str | None:
    """The known word that ``word`` most likely misspells."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return close[0] if close else None


#: Parts of an experiment that a message may begin with; one that begins otherwise speaks of the data.
_PLACES = ("data", "metrics", "method", "callbacks", "trainer")


class MistakeError(ValueError):
    """A shard that has vanished, a sample longer than the model reads, a metric that the method does not feed.

    Commands print it as one line and exit with code 2, in the middle of a training too, where every other error is taken for a bug
    and keeps its traceback. Raise it for what the owner of data or experiment can mend, and nothing else.

    Args:
        message: where, what was found, what is expected.
        row: row of the batch in work, where the one who raises knows no keys.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row

    def __str__(self) -> str:
        return super().__str__() if self.row is None else f"row {self.row}: {super().__str__()}"

    def line(self, keys: Sequence[str] = ()) -> str:
        """The message behind its place.

        Args:
            keys: of the batch in work; that of ``row`` is named.
        """
        text = super().__str__()
        if "Original Traceback" in text:  # torch raises a worker's error again, with the worker's traceback for a message
            text = text.strip().splitlines()[-1].partition(": ")[2]
        if self.row is not None:
            text = f"{keys[self.row] if self.row < len(keys) else f'row {self.row}'}: {text}"
        return text if text.startswith(tuple(f"{place}{mark}" for place in _PLACES for mark in ".:")) else f"data: {text}"
