"""``python -m data_pipelines.index SHARD…``: writer of the index beside tar shards, also those of others.

Each tar is read once, and NAME.tar.index.json written beside it (into the user's cache where that is forbidden): where each member
lies, the sizes of images by their headers, and the lengths of texts. An index of an earlier version is made again.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

from data_pipelines.command import SHARDS, Parser, add_part, run
from data_pipelines.shards.addresses import is_remote, shown
from data_pipelines.shards.expanding import expand
from data_pipelines.shards.index import is_current
from data_pipelines.shards.indexing import build_index, checked_index
from data_pipelines.shards.progress import progress_bar
from umm_zoo.errors import UserError, printable, say

_LISTED = 5


def parser() -> Parser:
    """The command line."""
    made = Parser(__doc__)
    made.add_argument("shards", nargs="+", metavar="SHARD", help=SHARDS)
    made.add_argument("--missing", action="store_true", help="only where there is no index yet, or one of an earlier version")
    add_part(made)
    return made


def main(arguments: argparse.Namespace) -> None:
    """Index every shard; those that cannot be indexed are named and the others done."""
    shards, failed = arguments.part.of(expand(arguments.shards)), 0
    for path, place in _indexed(shards, replace=not arguments.missing).items():
        try:
            if isinstance(place, Exception):
                raise place
            content = checked_index(path, place)
        except (UserError, OSError) as error:
            sys.stderr.write(f"error: {printable(str(error))}\n")
            failed += 1
            continue
        say(f"{shown(place)}: {content['counts']['samples']} samples")
        refused = [f"{content['keys'][int(number)]} ({reason})" for number, reason in content.get("refused", {}).items()]
        kinds = {
            "samples cannot be used": refused,
            "members came more than once; the first counts": content.get("duplicates"),
            "members belong to no sample": content.get("skipped"),
        }
        for what, found in kinds.items():
            if found:
                listed = ", ".join(found[:_LISTED]) + (" …" if len(found) > _LISTED else "")
                print(f"  {len(found)} {what}: {printable(listed)}")
    if failed:
        raise UserError("", f"{failed} of {len(shards)} shards could not be indexed")


def _indexed(shards: list[str], replace: bool) -> dict[str, str | Exception]:
    """The place of the index of each shard, or why it has none, with a bar of all bytes: each counts when measured and hashed."""
    sizes = {path: 0 if is_remote(path) else os.path.getsize(path) for path in shards}
    made: dict[str, str | Exception] = {}
    with progress_bar("indexing, MB", int(sum(sizes.values()) / 1e6) or 1, always=False) as advance:
        for path in shards:
            try:
                suits = partial(is_current, path)
                made[path] = build_index(path, replace, suits=suits, advance=lambda count: advance(count / 2e6))
            except (UserError, OSError) as error:
                made[path] = error
    return made


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
