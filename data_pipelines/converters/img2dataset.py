"""``python -m data_pipelines.img2dataset SRC OUT``: converter of what the downloader img2dataset wrote as webdataset tars.

::

    python -m data_pipelines.img2dataset cc12m shards/cc12m
    python -m data_pipelines.img2dataset laion-aesthetic shards/laion --task text_to_image --image-size 512

``SRC`` holds ``00000.tar`` with ``KEY.jpg``, ``KEY.txt`` and ``KEY.json`` (status, caption, url, width …), and beside it
``00000_stats.json`` with what could not be downloaded, which is counted in the report. A tar without statistics may still be
written by a running download; it is converted, and the report says so. One tar is written for each: OUT/train/captions-000000.tar
and so on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.command import Parser, run
from data_pipelines.converters.converting import Made, Noted
from data_pipelines.converters.pairs import convert_tar, convert_tars, find_tars, pairs_parser


def convert_shard(tar: Path, number: int, task: str, size: int | None) -> Iterator[Made]:
    """The samples of one tar, after the number of addresses that failed by the statistics beside it."""
    path = tar.with_name(f"{tar.name.partition('.')[0]}_stats.json")
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        counts = {name: int(stats.get(name) or 0) for name in ("failed_to_download", "failed_to_resize")}
    except FileNotFoundError:
        yield Noted("tar without _stats.json (its download may not be finished)")
    except Exception:  # whatever a parser raises over a file of others
        yield Noted("tar with an unreadable _stats.json")
    else:
        for name, count in counts.items():
            if count:
                yield Noted(f"address that {name.replace('_', ' ')} (by _stats.json, never in the tar)", count)
    yield from convert_tar(tar, number, task, size)


def parser() -> Parser:
    """The command line."""
    return pairs_parser(__doc__, "captions")


def main(arguments: argparse.Namespace) -> None:
    """Convert and report."""
    convert_tars(arguments, *find_tars(arguments.source), convert_shard)


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
