"""What a user can mend although it shows only while a run goes."""

from __future__ import annotations

from collections.abc import Sequence

#: Parts of an experiment that a message may begin with; one that begins otherwise speaks of the data.
_PLACES = ("data", "metrics", "method", "callbacks", "trainer")


class MistakeError(ValueError):
    """A shard that has vanished, a sample longer than the model reads, a metric that the method does not feed.

    Commands print it as one line and exit with code 2, in the middle of a training too, where every other error is taken for a bug
    and keeps its traceback. Raise it for what the owner of data or experiment can mend, and nothing else.

    Args:
        message: where, what was found, what is accepted.
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
