"""Pairs of image and text in tars that others made (``KEY.jpg``, ``KEY.txt``, sometimes ``KEY.json``), read in one pass."""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.command import Parser
from data_pipelines.converters.converting import LeftOut, Made, Noted, Part, convert, converter_parser
from data_pipelines.converters.files import stored_image
from data_pipelines.converters.texts import notes, without_markers
from data_pipelines.decoding import BadSampleError, decode_json, decode_text
from data_pipelines.shards.addresses import expand
from data_pipelines.shards.archive import read_samples
from data_pipelines.tasks import IMAGE_TYPES, INSTRUCTION, question_and_answer
from umm_zoo.conversation import IMAGE_MARKER
from umm_zoo.errors import UserError

#: What a pair becomes.
TASKS = ("text_to_image", "captions")
#: The caption is in the conversation already; the rest repeats the image's own header or the key.
_DROPPED = ("caption", "error_message", "exif", "key", "conversations")
_MAX_CHARACTERS = 1_000_000


def find_tars(source: Path) -> list[Path]:
    """The tars of a folder and its sub-folders, or what a glob or ``{000..015}`` range means, in sorted order."""
    if not source.is_dir():
        return [Path(path) for path in expand(str(source))]
    found = sorted(path for path in source.rglob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not found:
        raise UserError(source, "no tar file in this folder")
    return found


def read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample; a tar that is cut short, or none, is a ``BadSampleError`` after what it has."""
    try:
        yield from read_samples(str(path), cut_too=True)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadSampleError(f"tar cannot be read to its end: {error}") from error


def convert_tar(path: Path, number: int, task: str, size: int | None) -> Iterator[Made]:
    """The samples of one tar, and what is left out of it; ``number`` begins the keys, which tars of other downloads may repeat."""
    for place, (key, members) in enumerate(read_tar(path)):
        try:
            sample, noted = _pair(members, task, size)
        except BadSampleError as error:
            yield LeftOut(f"{path.name}/{key}", str(error))
            continue
        yield from noted
        sample["json"]["origin"] = f"{path.name}/{key}"
        yield {"__key__": f"{number:06d}-{place:08d}", **sample}


def pairs_parser(doc: str | None, task: str, needs_out: bool = True) -> Parser:
    """The command line of a converter of such tars; ``task`` is the default of what a pair becomes."""
    made = converter_parser(doc, "a folder of tars, one tar, a glob or a {000..015} range", needs_out=needs_out)
    made.add_argument("--task", choices=TASKS, default=task, help="whether the image is to be generated or described")
    return made


def convert_tars(
    arguments: argparse.Namespace, tars: list[Path], samples: Callable[[Path, int, str, int | None], Iterator[Made]] = convert_tar
) -> None:
    """Convert tars one by one into ``OUT/train/TASK-000000.tar`` and so on, and report; ``samples`` gives those of a tar."""
    part = Part(
        f"train/{arguments.task}",
        list(enumerate(tars)),
        lambda item: samples(item[1], item[0], arguments.task, arguments.image_size),
        lambda item: str(item[1]),
        items_per_shard=1,
    )
    convert(arguments, [part])


def _pair(members: dict[str, bytes], task: str, size: int | None) -> tuple[dict[str, Any], list[Noted]]:
    meta = decode_json(members["json"], _MAX_CHARACTERS) if "json" in members else {}
    status = meta.pop("status", "success")
    if status != "success":
        raise BadSampleError(f"status {status}: {meta.get('error_message') or 'no message'}")
    text = decode_text(members["txt"], _MAX_CHARACTERS) if "txt" in members else meta.get("caption")
    if not isinstance(text, str) or not text.strip():
        raise BadSampleError("no text" if text is None else "empty text")
    image = next((members[kind] for kind in IMAGE_TYPES if kind in members), None)
    if image is None:
        raise BadSampleError(f"missing image: found {', '.join(sorted(members))}")
    kind, content = stored_image(image, size)
    plain = without_markers(text)
    noted = [Noted(f"{IMAGE_MARKER} removed from a text")] * (plain != text.strip())
    is_caption = task == "captions"
    row: dict[str, Any] = {**notes(meta, _DROPPED), "task": "caption" if is_caption else "text_to_image", "kind": task}
    row["conversations"] = question_and_answer(INSTRUCTION, plain) if is_caption else [{"role": "user", "text": plain}]
    return {"json": row, f"{'0' if is_caption else 'target'}.{kind}": content}, noted
