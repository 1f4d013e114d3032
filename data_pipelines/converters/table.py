"""``python -m data_pipelines.table SRC OUT``: converter of a table of one's own: CSV, TSV, JSON, JSON Lines or parquet.

::

    python -m data_pipelines.table photos.csv shards/photos --images photos
    python -m data_pipelines.table FOLDER shards/mine                      # FOLDER/metadata.jsonl, or FOLDER/train/metadata.csv …
    python -m data_pipelines.table questions.tsv shards/questions --question ask --answer reply
    python -m data_pipelines.table edits.jsonl shards/edits --input before --instruction text --target after
    python -m data_pipelines.table 'vqa/train-*.parquet' shards/vqa --question question --answer multiple_choice_answer

An image is a name inside --images or beside the table, or bytes of a parquet file (plain, or ``{"bytes", "path"}`` as the
datasets library writes them), or a list of either. What a row becomes is detected by the names of the columns and what they hold,
and printed; options overrule it:

* ``editing``: input images, an instruction and an image to generate, under the names that data_pipelines.editing knows;
* ``conversations``: a column of turns (from/value, role/content), or of ``{"user", "assistant"}``, also as JSON text;
* ``questions``: a question and its answer (of a list of answers the most frequent one; all of them in ``answers``);
* ``captions``: a text, or several (columns caption_1 and caption_2, a list in a cell, or rows that name the same image);
* ``text_to_image``: a column called prompt, or an image called target: it is to be generated instead of described.

Written are OUT/SPLIT/TASK-000000.tar and so on. The split is that of folders (train, validation, test), of parquet files called
train-00000, or of a column split; else --val-share of the images are held out. In train every caption is a sample, in the other
splits every image, with all of its captions in ``captions``. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipelines.command import Parser, run, share
from data_pipelines.converters.answers import answer_of, captions_of, turns_of
from data_pipelines.converters.columns import TASKS, Columns, choose_columns
from data_pipelines.converters.converting import Made, Noted, Part, convert, converter_parser
from data_pipelines.converters.editing import LONGEST_NOTE, Keys
from data_pipelines.converters.editing import sample_of as edit_of
from data_pipelines.converters.files import Substitutes, image_members, inside
from data_pipelines.converters.images_of_rows import NAMES, RowImages, image_cells, located
from data_pipelines.converters.llava_json import reconcile
from data_pipelines.converters.sources import Sources
from data_pipelines.converters.texts import check_keys, notes, place_markers, task_and_kind, unread_files, wording
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import INSTRUCTION
from umm_zoo.conversation import Conversation, Turn
from umm_zoo.errors import UserError, locating, printable, say

#: ``task`` and ``kind`` of a sample.
_NAMES = {
    "captions": ("caption", "caption"),
    "text_to_image": ("text_to_image", "text_to_image"),
    "questions": ("questions", "vqa"),
    "conversations": ("conversation", "conversation"),
}
_ANOTHER = "caption of an image that is one sample, with all of its captions in 'captions'"
_HINT = "--images names the folder of the images, inside which all of them lie"
_LOOKED_AT = 50  # folders that may hold images that are missing
_NEXT = {
    "captions": "experiments/llava/table.yaml",
    "questions": "experiments/llava/table.yaml vars.rows=questions",
    "conversations": "experiments/llava/table.yaml vars.rows=conversations",
    "text_to_image": "experiments/metaquery/table.yaml",
    "editing": "experiments/metaquery/table.yaml vars.rows=editing",
}


class Converter:
    """Maker of the samples of a table's rows."""

    def __init__(self, sources: Sources, columns: Columns, rows: RowImages, arguments: argparse.Namespace) -> None:
        self.sources, self.columns, self.rows = sources, columns, rows
        self.root, self.size, self.one = arguments.images, arguments.image_size, arguments.captions == "one"
        self.unread = [name for name in sources.bytes_columns() if name not in columns.used]
        self._captions = lru_cache(64)(self._captions_of)  # rows of one image are neighbours

    def is_one(self, number: int) -> bool:
        """Whether only one sample is made of all rows of a row's image."""
        several = self.columns.task in ("captions", "text_to_image")
        return several and (self.one or self.rows.splits[number] != "train")

    def __call__(self, number: int) -> Iterator[Made]:
        """The samples of one row, after what was repaired."""
        if number in self.rows.refused:
            raise BadSampleError(self.rows.refused[number])
        yield from map(Noted, self.sources.repairs(number))
        if self.columns.task == "editing":
            yield from self._edit(number)
            return
        row = self.sources[number]
        check_keys(row, self.columns.used)
        folder, substitutes = self.sources.of(number).folder, Substitutes(self.sources.names_file)
        cells = [located(cell, folder, self.root) for cell in image_cells(row, self.columns.images)]
        repairs, made = self._conversations(row, number, len(cells))
        if not cells and self.columns.task != "conversations":
            raise BadSampleError("missing image: the cell is empty")
        is_target = self.columns.task == "text_to_image"
        if is_target and len(cells) != 1:
            raise BadSampleError(f"several images to generate: {len(cells)}")
        inputs, target = ([], cells[0]) if is_target else (cells, None)
        images = image_members(inputs, target, self.root or folder, self.size, substitutes=substitutes)
        names = {"file": printable(cells[0])} if cells and isinstance(cells[0], str) else {}
        others = {**names, **notes(row, {*self.columns.used, "task", "kind", "conversations"}, LONGEST_NOTE)}
        task, kind = _NAMES[self.columns.task]
        yield from map(Noted, [*repairs, *substitutes.repairs, *unread_files(row, {*self.columns.used, "id"})])
        yield from (Noted(f"image in the column '{name}' that is not converted") for name in self.unread)
        for place, (conversation, extra) in enumerate(made):
            content = {**others, **extra, **task_and_kind(row, task, kind), "conversations": conversation}
            yield {"__key__": f"{number:08d}" + (f"-{place}" if len(made) > 1 else ""), "json": content, **images}

    def _conversations(
        self, row: dict[str, Any], number: int, images: int
    ) -> tuple[list[str], list[tuple[Conversation, dict[str, Any]]]]:
        """What was repaired, and the conversations of a row, each with what else its sample says."""
        task, first = self.columns.task, row.get(self.columns.texts[0])
        if task == "conversations":
            conversation, repairs = reconcile(turns_of(first), images)
            return repairs, [(conversation, {})]
        if task == "questions":
            answer, extra = answer_of(row.get(self.columns.answer or ""))
            conversation = [Turn(role="user", text=wording(first, number)), Turn(role="assistant", text=answer)]
            place_markers(conversation, max(images, 1))
            return [], [(conversation, extra)]
        every = self._captions(tuple(self.rows.of_same_image(number)))
        extra = {"captions": every} if len(every) > 1 else {}
        made = []
        is_one = self.is_one(number) and every
        for caption in [every[number % len(every)]] if is_one else captions_of(row, self.columns.texts):
            conversation = [Turn(role="user", text=caption)]
            if task == "captions":
                conversation = [Turn(role="user", text=INSTRUCTION), Turn(role="assistant", text=caption)]
                place_markers(conversation, max(images, 1))
            made.append((conversation, extra))
        return [], made

    def _captions_of(self, rows: tuple[int, ...]) -> list[str]:
        """The captions of all rows of an image, without those that cannot be used."""
        found = []
        for number in rows:
            try:
                found += captions_of(self.sources[number], self.columns.texts)
            except BadSampleError:  # that row says so itself
                continue
        return list(dict.fromkeys(found))

    def _edit(self, number: int) -> Iterator[Made]:
        """The sample of an edit."""
        row, columns, folder = self.sources[number], self.columns, self.sources.of(number).folder
        cells = {name: found for name in (*columns.images, columns.target) if name and (found := image_cells(row, [name]))}
        row |= {name: [located(cell, folder, self.root) for cell in found] for name, found in cells.items()}
        inputs = [name for name in columns.images if name in cells]
        if not inputs:
            raise BadSampleError("missing image: the cell is empty")
        keys, root = Keys(inputs, columns.texts[0], columns.target), self.root or folder
        yield from edit_of(row, f"{number:08d}", number, keys, root, self.size, self.sources.names_file)


def parts_of(converter: Converter, per_shard: int) -> list[Part[int | str]]:
    """A part for each split; of an image of which one sample is made, the first row."""
    sources, rows = converter.sources, converter.rows
    chosen: dict[str, list[int | str]] = {split: [] for split in NAMES}
    others = dict.fromkeys(NAMES, 0)
    chosen["train"] += sources.unreadable
    for number in range(len(sources)):
        split = rows.splits[number]
        if converter.is_one(number) and rows.of_same_image(number)[0] != number:
            others[split] += 1
        else:
            chosen[split].append(number)

    def make(item: int | str) -> Iterator[Made]:
        if isinstance(item, str):
            raise BadSampleError(sources.unreadable[item])
        yield from converter(item)

    return [
        Part(
            f"{split}/{converter.columns.task}",
            items,
            make,
            lambda item: item if isinstance(item, str) else f"row {item}",
            per_shard,
            not_chosen={_ANOTHER: others[split]} if others[split] else {},
        )
        for split, items in chosen.items()
        if items
    ]


def _hint(sources: Sources, columns: Columns, root: Path | None) -> str:
    """Where images that are missing may lie: the folder beside or below that has the first row's."""
    folder = root or sources.files[0].folder
    with suppress(BadSampleError, OSError):
        name = image_cells(sources[0], columns.images)[:1]
        for other in sorted(path for path in folder.iterdir() if path.is_dir())[:_LOOKED_AT]:
            if name and isinstance(name[0], str) and inside(other, name[0]).is_file():
                return f"--images {shlex.quote(str(other))} has it"
    return _HINT


def next_commands(out: Path, task: str, splits: Sequence[str]) -> list[str]:
    """What to run on the shards, as it is typed from the root of the repository."""
    inspect = f"python -m data_pipelines.inspect {shlex.quote(str(out / splits[0]))} --sheet sheet.png"
    val = "" if "val" in splits else " vars.val=test" if "test" in splits else " data.val=null"
    name = re.sub(r"\W+", "-", out.name).strip("-") or "table"  # a run of its own for each table
    return [inspect, f"python -m umm_zoo.fit {_NEXT[task]} {shlex.quote(f'vars.data={out}')}{val} name={name}-{task}"]


def parser() -> Parser:
    """The command line."""
    source = "the table: .csv, .tsv, .json, .jsonl or .parquet; a folder with a metadata file or parquet files; a glob of those"
    made = converter_parser(__doc__, source, unit="rows")
    made.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the images (where None: the folder of the table)")
    made.add_argument("--task", choices=TASKS, help="what a row becomes (where None: detected)")
    for name, what in (
        ("image", "images"),
        ("text", "captions or prompts"),
        ("question", "the question"),
        ("answer", "the answer or answers"),
        ("turns", "a conversation's turns"),
        ("input", "the input images of an edit"),
        ("instruction", "the instruction of an edit"),
        ("target", "the image to generate of an edit"),
        ("split", "train, val or test"),
    ):
        options = (f"--{name}", f"--{name}-column")
        made.add_argument(*options, action="append", metavar="COLUMN", help=f"column of {what}; images and texts may have several")
    made.add_argument("--captions", choices=("every", "one"), default="every", help="samples of an image in train")
    made.add_argument("--val-share", type=share, default=0.1, help="share of the images held out, where nothing says a split")
    made.add_argument("--columns", metavar="NAME,NAME", help="names of the columns of a text file without a header")
    made.add_argument("--delimiter", help="of a text file, such as ';' or tab (where None: found)")
    made.add_argument("--encoding", help="of a text file, such as cp1252 or latin-1 (where None: UTF-8, or UTF-16 with its mark)")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert, report, and say what to run next."""
    if arguments.images and not arguments.images.is_dir():
        raise UserError("--images", f"{arguments.images}: no such folder")
    delimiter = {"tab": "\t", "\\t": "\t"}.get(arguments.delimiter, arguments.delimiter)
    if delimiter is not None and len(delimiter) != 1:
        raise UserError("--delimiter", f"'{delimiter}'", "one character, or tab")
    names = arguments.columns.split(",") if arguments.columns else None
    sources = Sources(arguments.source, delimiter=delimiter, encoding=arguments.encoding, columns=names)
    with locating(arguments.source):
        columns = choose_columns(sources.kinds, arguments)
    say(str(columns), stderr=True)
    held = sources.bytes_columns()
    groups = columns.task in ("captions", "text_to_image") and not held
    rows = RowImages(sources, columns, arguments.val_share, groups, bool(arguments.split))
    sources.leave_out([name for name in held if name not in columns.used])
    parts = parts_of(Converter(sources, columns, rows, arguments), arguments.rows_per_shard)
    hints = dict.fromkeys(("missing image", "outside of the folder"), _hint(sources, columns, arguments.images))
    if convert(arguments, parts, hints=hints, source=sources.fingerprint()):
        say("next:")
        for command in next_commands(arguments.out, columns.task, [part.name.partition("/")[0] for part in parts]):
            say(f"  {command}")


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
