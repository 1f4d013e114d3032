"""``python -m data_pipelines.index SHARD…``: writer of the index of byte offsets beside tar shards, also those of others.

Each tar is read once, and NAME.tar.index.json written beside it (into the user's cache where that is forbidden).
"""

from __future__ import annotations

import argparse
import sys

from data_pipelines.command import SHARDS, Parser, add_part, run
from data_pipelines.shards.addresses import shown
from data_pipelines.shards.expanding import expand
from data_pipelines.shards.indexing import build_index, checked_index
from umm_zoo.errors import UserError, printable, say

_LISTED = 5


def parser() -> Parser:
    """The command line."""
    made = Parser(__doc__)
    made.add_argument("shards", nargs="+", metavar="SHARD", help=SHARDS)
    made.add_argument("--missing", action="store_true", help="only where there is no index yet")
    add_part(made)
    return made


def main(arguments: argparse.Namespace) -> None:
    """Index every shard; those that cannot be indexed are named and the others done."""
    shards, failed = arguments.part.of(expand(arguments.shards)), 0
    for path in shards:
        try:
            place = build_index(path, replace=not arguments.missing)
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


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
