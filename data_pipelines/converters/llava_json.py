"""``python -m data_pipelines.llava_json SRC OUT``: converter of conversations in LLaVA's JSON or JSON Lines, with their images.

For LLaVA's 558k captions, its 665k mix, Cambrian's 737k and 7M lists, and lists of one's own::

    python -m data_pipelines.llava_json blip_laion_cc_sbu_558k.json shards/llava-558k --images LLaVA-Pretrain/images
    python -m data_pipelines.llava_json llava_v1_5_mix665k.json shards/llava-665k --images playground/data --image-size 672
    python -m data_pipelines.llava_json Cambrian737k.jsonl shards/cambrian --images cambrian --val-share 0.01

A row is ``{"id": …, "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt",
"value": …}]}``. ``image`` (or ``images``) may be a list, and is missing in text-only rows. The ``<image>`` markers are brought in
line with the images as LLaVA's own loader does: a single one is moved to the front of its turn, missing ones are added in front
of the first human turn; a row with more markers than images is left out and reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.command import Parser, run, share
from data_pipelines.converters.converting import Noted, Part, convert, converter_parser, split_of
from data_pipelines.converters.files import read_image
from data_pipelines.converters.rows import Rows
from data_pipelines.converters.texts import notes, place_markers
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import read_turns
from umm_zoo.batch import Conversation
from umm_zoo.errors import UserError

_USED = ("image", "images", "conversations", "task", "kind")


def sample_of(row: dict[str, Any], number: int, images: Path, size: int | None) -> Iterator[dict[str, Any] | Noted]:
    """The sample of one row, after what had to be repaired.

    Raises:
        BadSampleError: the row is not of the layout, or one of its images cannot be used.
    """
    names = image_names(row)
    conversation, repairs = reconcile(read_turns(row.get("conversations")), len(names))
    content: dict[str, Any] = {"task": "conversation", "kind": _kind(names), "conversations": conversation, **notes(row, _USED)}
    sample: dict[str, Any] = {"__key__": f"{number:08d}", "json": content}
    if names:
        content["files"] = names
    for place, name in enumerate(names):
        kind, image = read_image(images, name, size)
        sample[f"{place}.{kind}"] = image
    yield from map(Noted, repairs)
    yield sample


def image_names(row: dict[str, Any]) -> list[str]:
    """What stands under ``image`` or ``images``, as a list.

    Raises:
        BadSampleError: neither a name nor a list of names.
    """
    names = row.get("image", row.get("images"))
    names = names if isinstance(names, list) else [] if names in (None, "") else [names]
    for name in names:
        if not isinstance(name, str):
            raise BadSampleError(f"bad image name: {name!r}"[:200])
    return list(names)


def reconcile(conversation: Conversation, images: int) -> tuple[Conversation, list[str]]:
    """The conversation with exactly one marker per image, all of them in user turns, and what was changed.

    Raises:
        BadSampleError: there are more markers than images, or no question with an answer.
    """
    repairs = []
    while conversation and conversation[0]["role"] == "assistant":  # LLaVA's loader drops it as well
        conversation = conversation[1:]
        repairs.append("answer without a question at the beginning dropped")
    while conversation and conversation[-1]["role"] == "user":
        conversation = conversation[:-1]
        repairs.append("question without an answer at the end dropped")
    if not any(turn["role"] == "user" for turn in conversation):
        raise BadSampleError("no question with an answer")
    return conversation, repairs + place_markers(conversation, images)


def _kind(names: list[str]) -> str:
    """Where the row comes from, as far as its first image's folder tells (the 558k list has numbers for folders)."""
    if not names:
        return "text"
    folder = PurePosixPath(names[0]).parts[0] if len(PurePosixPath(names[0]).parts) > 1 else ""
    return folder if folder[:1].isalpha() else "image"


def _split(rows: Rows, number: int, val_share: float) -> str:
    """By the first image, so that no image is in two splits."""
    if not val_share:
        return "train"
    try:
        row = rows[number]
        return split_of(str((image_names(row) or [row.get("id", number)])[0]), val_share)
    except BadSampleError:
        return "train"


def parser() -> Parser:
    """The command line."""
    made = converter_parser(
        "llava_json",
        "Conversations in LLaVA's JSON with their images to shards: OUT/train/conversations-000000.tar and so on.",
        "the .json or .jsonl file",
        unit="rows",
    )
    made.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the images (where None: the folder of SRC)")
    made.add_argument("--val-share", type=share, default=0.0, help="share of the images held out, as OUT/val")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert and report.

    Raises:
        UserError: there is no such file or folder of images, or the file holds something else.
    """
    images = arguments.images or arguments.source.parent
    if not images.is_dir():
        raise UserError("--images", f"{images}: no such folder")
    rows = Rows(arguments.source)
    split = [_split(rows, number, arguments.val_share) for number in range(len(rows))]
    parts = [
        Part(
            f"{name}/conversations",
            [number for number in range(len(rows)) if split[number] == name],
            lambda number: sample_of(rows[number], number, images, arguments.image_size),
            lambda number: f"row {number}",
            arguments.rows_per_shard,
        )
        for name in ("train", "val")
        if name in split
    ]
    convert(arguments, parts, source=rows.fingerprint())


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
