"""``python -m data_pipelines.img2dataset SRC OUT``: what the downloader img2dataset wrote (``--output_format webdataset``).

::

    python -m data_pipelines.img2dataset cc12m shards/cc12m
    python -m data_pipelines.img2dataset laion-aesthetic shards/laion --task text_to_image --image-size 512

``SRC`` holds ``00000.tar`` with ``KEY.jpg``, ``KEY.txt`` and ``KEY.json`` (status, caption, url, width …), and beside it
``00000_stats.json`` with what could not be downloaded, which is counted in the report. A tar without statistics may still be
written by a running download; it is converted, and the report says so. One tar is written for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.converters.converting import LeftOut, Noted, Parser, add_options, check_numbers, run
from data_pipelines.converters.pairs import TASKS, convert_tar, convert_tars, find_tars


def convert_shard(tar: Path, number: int, task: str, size: int | None) -> Iterator[dict[str, Any] | LeftOut | Noted]:
    """The samples of one tar, after what its statistics tell.

    Raises:
        BadSampleError: the tar is cut short.
    """
    yield from statistics(tar)
    yield from convert_tar(tar, number, task, size)


def statistics(tar: Path) -> Iterator[Noted]:
    """How many of a tar's addresses failed, by the statistics beside it."""
    path = tar.with_name(f"{tar.stem}_stats.json")
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        counts = {name: int(stats.get(name, 0)) for name in ("failed_to_download", "failed_to_resize")}
    except FileNotFoundError:
        yield Noted("tar without _stats.json (its download may not be finished)")
        return
    except (OSError, ValueError, AttributeError, TypeError):
        yield Noted("tar with an unreadable _stats.json")
        return
    for name, count in counts.items():
        if count:
            yield Noted(f"address that {name.replace('_', ' ')} (by _stats.json, never in the tar)", count)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="python -m data_pipelines.img2dataset",
        description="Tars of img2dataset to samples: OUT/train/captions-000000.tar and so on.",
        epilog="A stopped conversion goes on when it is started again. Images are copied byte for byte unless shrunk.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("source", type=Path, metavar="SRC", help="the output folder, one tar, a glob or a {000..015} range")
    made.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    made.add_argument("--task", choices=TASKS, default="captions", help="whether the image is to be drawn or described")
    add_options(made, per_shard=None)
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert and report.

    Raises:
        ValueError: an argument outside its range, or nothing that could be converted.
        FileNotFoundError: there is no tar.
    """
    check_numbers(arguments)
    convert_tars(arguments, find_tars(arguments.source), convert_shard)


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(parser().parse_args())))
