"""``python -m data_pipelines.editing SRC OUT``: converter of edits from JSON, JSON Lines or parquet, with one or more input images.

::

    python -m data_pipelines.editing UniWorld/imgedit.json shards/imgedit --images UniWorld/images
    python -m data_pipelines.editing ImgEdit/Parquet/add_part0.parquet shards/add --images ImgEdit/Singleturn
    python -m data_pipelines.editing 'OmniEdit/data/train-*.parquet' shards/omniedit --image-size 1024
    python -m data_pipelines.editing mine.jsonl shards/mine --input person garment --instruction text --target worn

Understood are, in this order, and each by the first of its keys that a row has:

* ``data``: a list of rows as below, the turns of ImgEdit's multi-turn edits; each becomes a sample of its own;
* ``conversations`` (UniWorld): ``image`` is ``[reference, …, target]``; the assistant's last turn is ``<gen_image>``, and without
  references the row is one of text-to-image;
* input images (a value or a list): input_images, source_images, input_image, source_image, source_img, src_img, original_image,
  input, source, images, image;
* the instruction (a list is of equally good wordings, one is taken): edit_instruction, instruction, edit_prompt, input_prompt,
  edited_prompt_list, edited_prompt, prompt, edit;
* the image to generate: output_images, output_image, target_image, target_img, tgt_img, trg_img, edited_image, edited_img,
  output, target, edited.

Images are names inside ``--images``, or bytes in parquet columns (plain, or ``{"bytes", "path"}``). Written are
OUT/train/editing-000000.tar and so on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.command import Parser, run
from data_pipelines.converters.converting import LeftOut, Made, Noted, Part, convert, converter_parser, image_folder_of
from data_pipelines.converters.files import Substitutes, image_members
from data_pipelines.converters.parquet_rows import ParquetRows, is_parquet
from data_pipelines.converters.rows import Rows
from data_pipelines.converters.texts import check_keys, check_media, is_name, notes, place_markers, unread_files, wording
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import read_turns
from umm_zoo.conversation import IMAGE_MARKER, Conversation, Turn

INPUTS = (
    *("input_images", "source_images", "input_image", "source_image", "source_img", "src_img", "original_image"),
    *("input", "source", "images", "image"),
)
INSTRUCTIONS = (
    *("edit_instruction", "instruction", "edit_prompt", "input_prompt"),
    *("edited_prompt_list", "edited_prompt", "prompt", "edit"),
)
TARGETS = (
    *("output_images", "output_image", "target_image", "target_img", "tgt_img", "trg_img", "edited_image", "edited_img"),
    *("output", "target", "edited"),
)
_KINDS = ("edit_type", "kind", "task", "category")
_GENERATED = "<gen_image>"
_EMPTY: tuple[Any, ...] = (None, "", [])
LONGEST_NOTE = 2000
_HINTS = {": the row has ": "--input, --instruction and --target name the keys"}


@dataclass(frozen=True)
class Keys:
    """Keys of what a row has; None takes the first of `INPUTS`, `INSTRUCTIONS` or `TARGETS` that is there."""

    inputs: Sequence[str] | None = None
    instruction: str | None = None
    target: str | None = None


@dataclass
class Edit:
    """Edit before its images are read: the turns, and cells that name or hold images."""

    conversation: Conversation
    inputs: list[Any]
    target: Any
    used: set[str]


def samples_of(
    rows: Rows | ParquetRows, number: int, keys: Keys, images: Path | None = None, size: int | None = None
) -> Iterator[Made]:
    """The samples of one row: several where it has several turns."""
    row, is_named = rows[number], rows.names_file
    turns = row.get("data")
    if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
        yield from sample_of(row, f"{number:08d}", number, keys, images, size, is_named)
        return
    for place, turn in enumerate(turns):
        try:
            yield from sample_of({**turn, "turn": place}, f"{number:08d}-{place}", number, keys, images, size, is_named)
        except BadSampleError as error:
            yield LeftOut(f"row {number}, turn {place}", str(error))


def sample_of(
    row: dict[str, Any],
    key: str,
    number: int,
    keys: Keys,
    images: Path | None,
    size: int | None,
    is_named: Callable[[str], bool],
) -> Iterator[Made]:
    """The sample of one edit, after what was repaired."""
    edit = read_edit(row, number, keys)
    check_media(edit.conversation)
    check_keys(row, edit.used)
    repairs = place_markers(edit.conversation, len(edit.inputs))
    task = "editing" if edit.inputs else "text_to_image"
    kind = next((name for name in _KINDS if is_name(row.get(name))), None)
    others = {f"row_{name}" if name in ("task", "kind") else name: value for name, value in row.items() if name != kind}
    content = {**notes(others, edit.used, LONGEST_NOTE), "task": task, "kind": "edit" if edit.inputs else task}
    if kind:
        content["kind"] = row[kind].strip()
    content["conversations"] = edit.conversation
    if not edit.inputs:
        repairs = []
    repairs = [what for what in repairs if "moved" not in what and "missing" not in what]  # most lists write no marker
    repairs += unread_files(row, {*edit.used, "id"})
    substitutes = Substitutes(is_named)
    members = image_members(edit.inputs, edit.target, images, size, substitutes=substitutes)
    sample = {"__key__": key, "json": content, **members}
    yield from map(Noted, repairs + substitutes.repairs)
    yield sample


def read_edit(row: dict[str, Any], number: int, keys: Keys) -> Edit:
    """Instruction and images of a row, in one of the layouts of this module; its number chooses among wordings."""
    if keys == Keys() and row.get("conversations"):
        return _from_conversation(row)
    inputs = [name for name in keys.inputs or _first(row, INPUTS) if row.get(name) not in _EMPTY]
    instruction = [keys.instruction] if keys.instruction else _first(row, INSTRUCTIONS)
    target = [keys.target] if keys.target else _first(row, TARGETS)
    for what, names in (("input image", inputs), ("instruction", instruction), ("image to generate", target)):
        if not names or row.get(names[0]) in _EMPTY:
            raise BadSampleError(f"no {what}: the row has {', '.join(map(str, row)) or 'no key'}"[:300])
    if keys.inputs and len(inputs) < len(keys.inputs):
        raise BadSampleError(f"no input image: '{next(name for name in keys.inputs if name not in inputs)}' is empty")
    text = wording(row[instruction[0]], number, "instruction")
    cells = [cell for name in inputs for cell in _list(row[name])]
    used = {*inputs, *instruction, *target}
    return Edit([Turn(role="user", text=text)], cells, _only(row[target[0]]), used)


def _from_conversation(row: dict[str, Any]) -> Edit:
    """UniWorld's layout."""
    turns = read_turns(row["conversations"])
    cells = _list(row.get("image", row.get("images")) or [])
    while turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    answer = turns[-1]["text"].strip() if turns else ""
    if not turns or answer not in (_GENERATED, IMAGE_MARKER, ""):
        raise BadSampleError("no image to generate: its answer is text (data_pipelines.llava_json converts such rows)")
    if not cells:
        raise BadSampleError("no image to generate: 'image' is empty")
    if cells[-1] in _EMPTY:
        raise BadSampleError("no image to generate: the last of 'image' is empty")
    for turn in turns:
        turn["text"] = turn["text"].replace(_GENERATED, "").strip()
    return Edit(turns[:-1], cells[:-1], cells[-1], {"conversations", "image", "images"})


def _first(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if row.get(name) not in _EMPTY][:1]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _only(value: Any) -> Any:
    cells = _list(value)
    if len(cells) != 1:
        raise BadSampleError(f"several images to generate: {len(cells)}")
    return cells[0]


def parser() -> Parser:
    """The command line."""
    made = converter_parser(__doc__, ".json, .jsonl or .parquet; a folder or glob of parquet files", unit="rows")
    made.add_argument("--images", type=Path, metavar="FOLDER", help="folder of named images (where None: the folder of SRC)")
    made.add_argument("--input", nargs="+", metavar="KEY", help="keys of the input images, in order (where None: detected)")
    for name, what in (("instruction", "the instruction"), ("target", "the image to generate")):
        made.add_argument(f"--{name}", metavar="KEY", help=f"key of {what} (where None: detected)")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert and report."""
    images = image_folder_of(arguments)
    rows: Rows | ParquetRows = ParquetRows(arguments.source) if is_parquet(arguments.source) else Rows(arguments.source)
    keys = Keys(arguments.input, arguments.instruction, arguments.target)
    if isinstance(rows, Rows) and keys == Keys():
        rows.check_wrapped("data", "conversations", *INPUTS, *INSTRUCTIONS, *TARGETS)
    convert_rows(arguments, rows, "editing", lambda number: samples_of(rows, number, keys, images, arguments.image_size))


def convert_rows(arguments: argparse.Namespace, rows: Rows | ParquetRows, name: str, make: Callable[[int], Iterable[Made]]) -> None:
    """Convert rows by number, report, and list among what was left out the files that could not be opened."""

    def checked(item: int | str) -> Iterator[Made]:
        if isinstance(item, str):
            raise BadSampleError(rows.unreadable[item])
        yield from make(item)

    items: list[int | str] = [*rows.unreadable, *range(len(rows))]
    label: Callable[[int | str], str] = lambda item: item if isinstance(item, str) else f"row {item}"  # noqa: E731
    part = Part(f"train/{name}", items, checked, label, arguments.rows_per_shard, holds_rows=name == "editing")
    convert(arguments, [part], hints=_HINTS if name == "editing" else {}, source=rows.fingerprint())


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
