"""Settings of a request, read and checked alike on the command line and in a batch file. Nothing here imports torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from umm_zoo.errors import UserError, printable

#: Largest seed: what every generator takes.
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Option:
    """One setting.

    Args:
        help: one line.
        metavar: of its value on the command line.
        expected: the values that it takes, for the error.
        convert: the value from a text of the command line or a value of JSON; a ``ValueError`` where it is none.
        default: where nothing is said; None leaves it to the run.
        switch: whether it stands on the command line without a value; one that is off is no setting at all.
    """

    help: str
    metavar: str
    expected: str
    convert: Callable[[Any], Any]
    default: Any = None
    switch: bool = False

    def read(self, value: Any, where: str) -> Any:
        """The setting; a ``UserError`` at ``where`` if the value is none."""
        try:
            return self.convert(value)
        except ValueError:
            raise UserError(where, shown(value), self.expected) from None


def whole(help: str, low: int, high: int, default: int | None = None) -> Option:
    """A whole number."""

    def convert(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,20}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    expected = f"a positive whole number up to {high}" if low == 1 else f"a whole number from {low} to {high}"
    return Option(help, "N", expected, convert, default)


def switch(help: str) -> Option:
    """On where it is said."""

    def convert(value: Any) -> bool | None:
        words = {"true": True, "yes": True, "false": None, "no": None}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise ValueError
        return value or None

    return Option(help, "", "true or false", convert, switch=True)


def settings_in(options: Mapping[str, Option], given: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """The settings that are given, others at their defaults; switches that are off are left out.

    Raises:
        UserError: one cannot be, at ``where`` of its name.
    """
    said = {name: value for name, value in given.items() if value is not None}
    read = {name: own.read(said[name], where(name)) if name in said else own.default for name, own in options.items()}
    return {name: value for name, value in read.items() if value is not None or not options[name].switch}


def number(help: str, low: float, high: float, default: float | None = None) -> Option:
    """A finite number."""

    def convert(value: Any) -> float:
        if isinstance(value, str):
            value = float(value)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return float(value)

    return Option(help, "X", f"a number from {low:g} to {high:g}", convert, default)


def size(help: str, longest: int) -> Option:
    """Height and width."""

    def convert(value: Any) -> tuple[int, int]:
        text = str(value) if isinstance(value, int) else value
        if not isinstance(text, str) or not (found := re.fullmatch(r"([0-9]{1,9})(?:[xX]([0-9]{1,9}))?", text)):
            raise ValueError
        height, width = int(found[1]), int(found[2] or found[1])
        if not (1 <= height <= longest and 1 <= width <= longest):
            raise ValueError
        return height, width

    return Option(help, "HxW", f"512 or 512x768, with sides from 1 to {longest}", convert)


def checked_text(text: Any, where: str, what: str) -> str:
    """A text that a tokenizer takes and a terminal shows.

    Raises:
        UserError: it is no text, or holds control characters or halves of surrogate pairs.
    """
    if not isinstance(text, str):
        raise UserError(where, shown(text), what)
    for place, letter in enumerate(text):
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r":
            found = f"the character {printable(letter)} at place {place + 1} of '{shortened(text)}'"
            raise UserError(where, found, f"{what} without control characters, in UTF-8")
    return text


def shown(value: Any) -> str:
    """A value for an error line; the command line's numbers are texts."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[+-]?[0-9.]{1,20}", value) else f"'{shortened(value)}'"
    return shortened(json.dumps(value, default=repr))


def shortened(text: str, length: int = 60) -> str:
    """The beginning of a text, escaped."""
    return printable(text if len(text) <= length else text[:length] + " …")
