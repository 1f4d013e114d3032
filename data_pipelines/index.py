"""``python -m data_pipelines.index SHARD…``: write the index of byte offsets beside tar shards, also those that others made."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data_pipelines.converters.converting import Parser, run
from data_pipelines.shards.addresses import expand
from data_pipelines.shards.index import build_index

_LISTED = 5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="python -m data_pipelines.index",
        description="Read tar shards once and write NAME.tar.index.json beside each (into the cache where that is forbidden).",
    )
    made.add_argument("shards", nargs="+", metavar="SHARD", help="tar files, folders, globs, {000..015} ranges or addresses")
    made.add_argument("--missing", action="store_true", help="only where there is no index yet")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Index every shard; those that cannot be indexed are named and the others done.

    Raises:
        ValueError: some shards could not be indexed.
    """
    failed = 0
    for path in expand(arguments.shards):
        try:
            place = build_index(path, replace=not arguments.missing)
        except (ValueError, OSError) as error:
            sys.stderr.write(f"error: {error}\n")
            failed += 1
            continue
        content = json.loads(Path(place).read_text(encoding="utf-8"))
        print(f"{place}: {content['counts']['samples']} samples")
        for name, what in (("duplicates", "came more than once; the first counts"), ("skipped", "belong to no sample")):
            if found := content.get(name):
                shown = ", ".join(found[:_LISTED]) + (" …" if len(found) > _LISTED else "")
                print(f"  {len(found)} members {what}: {shown}")
    if failed:
        raise ValueError(f"{failed} of {len(expand(arguments.shards))} shards could not be indexed")


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(parser().parse_args())))
