"""Shards that are meant by files, folders, globs, ranges of names and addresses. Never a command."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from glob import escape, glob

from data_pipelines.shards.addresses import filesystem, is_remote, shown
from data_pipelines.shards.remote import listed
from umm_zoo.errors import UserError

_BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
#: Names that one entry may stand for; a typing error otherwise fills the memory.
MAX_SHARDS = 1_000_000


def expand(shards: str | Sequence[str]) -> list[str]:
    """The tar files meant by a folder, a glob, a ``{000..015}`` range, an address, or a list of these, in sorted order per entry.

    What names nothing that exists, a command (``pipe:``), or a shard twice is a ``UserError``.
    """
    found: list[str] = []
    for entry in [shards] if isinstance(shards, str) else list(shards):
        if (count := math.prod(int(high) - int(low) + 1 for low, high in _BRACES.findall(str(entry)))) > MAX_SHARDS:
            raise UserError(str(entry), f"ranges of {count:,} names", f"at most {MAX_SHARDS:,} shards")
        for pattern in _braces(str(entry)):
            found += _expand_one(pattern)
    if not found:
        raise UserError("shards", "an empty list", "a folder, a glob, or a list of tar files")
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise UserError(shown(twice), "this shard is named twice; its samples would be read twice per epoch")
    return found


def _braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    low, high = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for n in range(int(low), int(high) + 1) for name in _braces(f"{head}{n:0{len(low)}d}{tail}")]


def _expand_one(pattern: str) -> list[str]:
    if pattern.startswith(("pipe:", "|", "!")):
        raise UserError(shown(pattern), "shards are read, never run", hint="expected files and http(s), s3 or gs addresses")
    if is_remote(pattern):
        filesystem(pattern)  # says now, and not in the midst of training, that the address cannot be read
        if not any(letter in pattern for letter in "*?["):
            return [pattern]
        matches = listed(pattern)
    elif os.path.isdir(pattern):
        matches = sorted(glob(os.path.join(escape(pattern), "*.tar")))
    elif os.path.isfile(pattern):
        matches = [pattern]
    else:
        matches = sorted(name for name in glob(pattern, recursive=True) if name.endswith(".tar"))
    if not matches:
        raise UserError(shown(pattern), f"no shard (*.tar) found there, looking from {os.getcwd()}")
    return matches
