"""What an experiment out of weights reaches beside them: folders that it would write to, and what it fetches from the network.

Weights are often somebody else's. They are scored and used without a byte written where their experiment says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from umm_zoo.errors import note
from umm_zoo.experiment.shipped import PREFIX

#: Where the parts that are shipped lie.
_ROOT = Path(__file__).resolve().parents[2]
#: Keys of an experiment whose folders are written to where it is scored.
WRITTEN = ("data.cache",)
#: Arguments that name other weights, or data.
_READ = ("source", "file", "tokenizer", "vision_tower", "language_model", "shards", "model_name_or_path")

_untouched: ContextVar[bool] = ContextVar("untouched", default=False)


@contextmanager
def untouched(really: bool = True) -> Iterator[None]:
    """For a time, nothing is written beside the data that is read (``may_write_beside``)."""
    token = _untouched.set(really)
    try:
        yield
    finally:
        _untouched.reset(token)


def may_write_beside() -> bool:
    """Whether something may be written beside data, such as its index: not where a stranger's experiment says where that is."""
    return not _untouched.get()


def leave_out(parts: Mapping[str, dict[str, Any]], source: str | Path, overrides: Sequence[str], most: Mapping[str, int]) -> None:
    """Take out of the parts of an experiment the folders that it would write to, and processes that this machine has no room for.

    A note on stderr says which.

    Args:
        parts: of the experiment that weights hold, with what the user has changed.
        source: the weights, for the note.
        overrides: ``key=value`` that the user has given himself.
        most: keys that say how many processes are started or waited for, and how many may be.
    """
    why = {key: "weights name no folder to write to" for key in WRITTEN} | {key: "weights start no such number" for key in most}
    for key, said in why.items():
        top, _, name = key.partition(".")
        given = [
            own for own, _, value in (text.partition("=") for text in overrides) if own == key or (own == top and name in value)
        ]
        value = parts[top].get(name)
        if not given and value is not None and (key in WRITTEN or (isinstance(value, int) and value > most[key])):
            note(f"{source}: {key} {parts[top].pop(name)!r} of its experiment is left out: {said} ({key}=… gives one)")


def say_fetched(parts: Mapping[str, Any], source: str | Path) -> None:
    """Say on stderr what the parts of an experiment would fetch: addresses, and weights that are no file here."""
    if found := sorted({f"{what} ({where})" for where, what in _fetched(parts, "")}):
        note(f"{source}: its experiment reads from the network: {', '.join(found)}")


def _fetched(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _fetched(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _fetched(inner, where)
    elif isinstance(value, str) and where.rpartition(".")[2] in _READ:
        here = value.startswith(PREFIX) or Path(value).exists() or (_ROOT / value).exists()
        is_name = not where.endswith(".shards") and not here
        if "://" in value or is_name:
            parts = urlsplit(value) if "://" in value else None
            yield where, repr(value if parts is None else f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
