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
from pathlib import Path

from data_pipelines.command import Parser, run
from data_pipelines.converters.pairs import convert_tars, find_tars, pairs_parser
from data_pipelines.shards.index import load_index
from data_pipelines.tasks import IMAGE_TYPES
from umm_zoo.errors import UserError


def index_in_place(tars: list[Path]) -> None:
    """Index every tar and print how many of its samples are pairs, by the names of their members."""
    pairs, others = 0, list[str]()
    for tar in tars:
        index = load_index(str(tar))
        for number in range(len(index)):
            names = index.names(number)
            if "txt" in names and any(kind in names for kind in IMAGE_TYPES):
                pairs += 1
            else:
                others.append(f"{tar.name}/{index.key(number)}")
    print(f"{len(tars)} tars indexed, {pairs} pairs of image and text")
    if others:
        print(f"{len(others)} samples without image or text (skipped in training): {', '.join(others[:5])}")


def parser() -> Parser:
    """The command line."""
    made = pairs_parser(__doc__, "text_to_image", needs_out=False)
    made.add_argument("--in-place", action="store_true", help="write nothing but an index beside each tar")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Index or convert, and report."""
    if arguments.in_place == (arguments.out is not None):
        raise UserError("OUT", "give either a folder to write into, or --in-place")
    tars = find_tars(arguments.source)
    if arguments.in_place:
        index_in_place(tars)
    else:
        convert_tars(arguments, tars)


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
