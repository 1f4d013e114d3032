"""``python -m data_pipelines.llava_json SRC OUT``: converter of conversations in LLaVA's JSON or JSON Lines, with their images.

For LLaVA's 558k captions, its 665k mix, Cambrian's 737k and 7M lists, and lists of one's own::

    python -m data_pipelines.llava_json blip_laion_cc_sbu_558k.json shards/llava-558k --images LLaVA-Pretrain/images
    python -m data_pipelines.llava_json llava_v1_5_mix665k.json shards/llava-665k --images playground/data --image-size 672
    python -m data_pipelines.llava_json Cambrian737k.jsonl shards/cambrian --images cambrian --val-share 0.01

A row is ``{"id": …, "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt",
"value": …}]}``. ``image`` (or ``images``) may be a list, and is missing in text-only rows. The ``<image>`` markers are brought in
line with the images as LLaVA's own loader does: a single one is moved to the front of its turn, missing ones are added in front
of the first human turn; a row with more markers than images is left out and reported, and so is one of a video, or with its
files under another key. A row's own ``task`` and ``kind`` are kept; else the kind is the first folder of its image. Written are
OUT/train/conversations-000000.tar and so on.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.command import Parser, run, share
from data_pipelines.converters.converting import Made, Noted, Part, convert, converter_parser, image_folder_of, split_of
from data_pipelines.converters.files import Substitutes, image_members
from data_pipelines.converters.rows import Rows
from data_pipelines.converters.texts import (
    check_keys,
    check_media,
    is_file,
    is_name,
    keys_of,
    notes,
    place_markers,
    task_and_kind,
    unread_files,
)
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import read_turns
from umm_zoo.conversation import Conversation

_USED = ("image", "images", "conversations", "task", "kind")
_NOT_OTHERS = (*_USED, "id")
_NONE: tuple[Any, ...] = (None, "", [])
_MEDIUM = re.compile(r"(^|_)(image|img|picture|photo|video|audio)s?(_|$)", re.I)


def sample_of(row: dict[str, Any], number: int, images: Path, size: int | None, substitutes: Substitutes) -> Iterator[Made]:
    """The sample of one row, after what had to be repaired."""
    names = image_names(row)
    conversation, repairs = reconcile(read_turns(row.get("conversations")), len(names))
    content = {**task_and_kind(row, "conversation", _kind(names)), "conversations": conversation, **notes(row, _USED)}
    if names:
        content["files"] = names
    repairs += unread_files(row, _NOT_OTHERS)
    members = image_members(names, None, images, size, substitutes=substitutes)
    sample = {"__key__": f"{number:08d}", "json": content, **members}
    yield from map(Noted, repairs + substitutes.repairs)
    yield sample


def image_names(row: dict[str, Any]) -> list[str]:
    """The value of ``image`` or ``images``, as a list; a row of another medium, or with its images elsewhere, is no text."""
    found = [names if isinstance(names, list) else [names] for key in ("image", "images") if (names := row.get(key)) not in _NONE]
    if len(found) == 2 and found[0] != found[1]:
        raise BadSampleError("both 'image' and 'images', which name different files")
    names = found[0] if found else []
    if not names and (others := keys_of(row, _NOT_OTHERS, lambda key, text: _MEDIUM.search(key) or is_file(key, text))):
        raise BadSampleError(f"no 'image', but files under the key '{others[0]}'")
    check_keys(row, _NOT_OTHERS)
    for name in names:
        if not isinstance(name, str):
            raise BadSampleError(f"bad image name: {name!r}"[:200])
    return list(names)


def reconcile(conversation: Conversation, images: int) -> tuple[Conversation, list[str]]:
    """The conversation with exactly one marker per image, all of them in user turns, and what was changed."""
    check_media(conversation)
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
    """Source of the row, as far as its first image's folder tells (the 558k list has numbers for folders)."""
    if not names:
        return "text"
    folder = PurePosixPath(names[0]).parts[0] if len(PurePosixPath(names[0]).parts) > 1 else ""
    return folder if folder[:1].isalpha() and is_name(folder) else "image"


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
    made = converter_parser(__doc__, "the .json or .jsonl file", unit="rows")
    made.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the images (where None: the folder of SRC)")
    made.add_argument("--val-share", type=share, default=0.0, help="share of the images held out, as OUT/val")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert and report."""
    rows, images = Rows(arguments.source), image_folder_of(arguments)
    rows.check_wrapped("conversations")
    split = [_split(rows, number, arguments.val_share) for number in range(len(rows))]
    make: Callable[[int], Iterator[Made]] = lambda number: sample_of(  # noqa: E731
        rows[number], number, images, arguments.image_size, Substitutes(rows.names_file)
    )
    parts = [
        Part(f"{name}/conversations", chosen, make, "row {}".format, arguments.rows_per_shard)
        for name in ("train", "val")
        if (chosen := [number for number in range(len(rows)) if split[number] == name])
    ]
    convert(arguments, parts, source=rows.fingerprint())


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
