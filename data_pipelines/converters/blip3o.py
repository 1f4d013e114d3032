"""``python -m data_pipelines.blip3o SRC OUT``: converter of tars of ``KEY.jpg`` and ``KEY.txt``, as BLIP3-o publishes its data.

Such tars can be trained on as they are; then they only need an index each, and nothing is copied::

    python -m data_pipelines.blip3o BLIP3o-Pretrain-Long-Caption --in-place

after which an experiment names them with the task ``{_target_: data_pipelines.tasks.TextToImage}``. With a second folder they are
checked image by image, and rewritten in this project's layout, one tar for each (OUT/train/text_to_image-000000.tar and so on)::

    python -m data_pipelines.blip3o BLIP3o-60k shards/blip3o-60k
    python -m data_pipelines.blip3o 'BLIP3o-Pretrain/sa_{000000..000049}.tar' shards/sa --image-size 1024 --task captions
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from data_pipelines.command import Parser, run
from data_pipelines.converters.pairs import convert_tars, find_tars, pairs_parser
from data_pipelines.shards.index import load_index
from data_pipelines.tasks import IMAGE_TYPES
from umm_zoo.errors import UserError, printable


def index_in_place(tars: list[Path], refused: Mapping[str, str]) -> None:
    """Index every tar and print how many of its samples are pairs, by the names of their members, and why others are none.

    ``refused`` are archives of other kinds, which are named.
    """
    pairs, others, reasons, failed = 0, list[str](), Counter[str](), list[str]()
    for tar in tars:
        try:
            index = load_index(str(tar))
        except (UserError, OSError) as error:
            sys.stderr.write(f"error: {printable(str(error))}\n")
            failed.append(tar.name)
            continue
        for number in range(len(index)):
            if reason := _why_no_pair(index.names(number)):
                others.append(printable(f"{tar.name}/{index.key(number)}"))
                reasons[reason] += 1
            else:
                pairs += 1
    print(f"{len(tars) - len(failed)} tars indexed, {pairs} pairs of image and text")
    if others:
        print(f"{len(others)} samples that are no pairs (skipped in training): {', '.join(others[:5])}")
        print(*(f"  {count} {reason}" for reason, count in reasons.most_common()), sep="\n")
    for file, reason in refused.items():
        print(printable(f"not indexed: {file} ({reason})"))
    if failed:
        raise UserError("", f"{len(failed)} of {len(tars)} tars could not be indexed")


def _why_no_pair(names: list[str]) -> str:
    """The reason why members that share a key, their names up to the first dot, are no pair; empty where they are one."""
    if any("." in name and name.rpartition(".")[2] in ("txt", *IMAGE_TYPES) for name in names):
        return "with dots in the names of files, so that several pairs may be one sample (converted to OUT they are told apart)"
    images = [name for name in names if name in IMAGE_TYPES]
    return (
        "without text"
        if "txt" not in names
        else "without image"
        if not images
        else "with several images"
        if len(images) > 1
        else ""
    )


def parser() -> Parser:
    """The command line."""
    made = pairs_parser(__doc__, "text_to_image", needs_out=False)
    made.add_argument("--in-place", action="store_true", help="write nothing but an index beside each tar")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Index or convert, and report."""
    if arguments.in_place == (arguments.out is not None):
        raise UserError("OUT", "give either a folder to write into, or --in-place")
    tars, refused = find_tars(arguments.source)
    if arguments.in_place:
        index_in_place(list(arguments.part.of(tars)), refused if arguments.part.number == 1 else {})
    else:
        convert_tars(arguments, tars, refused)


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
