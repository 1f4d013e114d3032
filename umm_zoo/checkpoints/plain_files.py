"""Text files written whole or not at all, and JSON that every reader takes. Nothing here imports torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from umm_zoo.checkpoints.folder import PARTIAL, sync
from umm_zoo.errors import UserError

#: Key at the top of a map in which ``strict_json`` says what its nulls were.
NOT_FINITE = "not_finite"


def write_whole(path: Path, text: str, writer: str = "") -> None:
    """Write under a temporary name, flush to the disk, rename: a reader, or a crash, never meets half a file.

    ``writer`` is in that name, where several may write the file at once.
    """
    partial = path.with_name(f"{path.name}{writer}{PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def writing(
    path: str | Path, instead: str = "a folder that can be written (--runs DIR, or the variable UMM_ZOO_RUNS)"
) -> Iterator[None]:
    """Around writes to ``path``.

    Raises:
        UserError: the place cannot be written, or its disk is full.
    """
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, str(path)) else f", {error.filename}"
        raise UserError(path, f"a place that cannot be written ({error.strerror}{where})", instead) from error


def write_json(place: str | Path, content: Any, indent: int | None = None) -> None:
    """`write_whole` of ``strict_json`` by one of several processes, into a folder that is made; an error names the file."""
    path, separators = Path(place), (",", ":") if indent is None else None
    path.parent.mkdir(parents=True, exist_ok=True)
    text = strict_json(content, indent=indent, ensure_ascii=False, separators=separators)
    try:
        write_whole(path, text + "\n", f".{os.getpid()}")
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror or str(error), str(place)) from error


def strict_json(value: Any, **options: Any) -> str:
    """Text of a value as JSON proper (RFC 8259), which has no NaN and no infinity.

    A number that is not finite becomes null. Where the value is a map, its key ``not_finite`` says of each null where it stands and
    what it was: ``{"metrics.val/perplexity": "inf"}``.
    """
    with suppress(ValueError):
        return json.dumps(value, allow_nan=False, **options)  # nearly always, and an index may be long
    reasons = {path: str(number) for path, number in _not_finite(value, "")}
    plain = _nulled(value)
    if isinstance(plain, dict):
        plain[NOT_FINITE] = reasons
    return json.dumps(plain, allow_nan=False, **options)


def _not_finite(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if _is_list(value) else ()
    for key, item in inside:
        yield from _not_finite(item, f"{where}.{key}" if where else str(key))


def _nulled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nulled(item) for key, item in value.items()}
    if _is_list(value):
        return [_nulled(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
