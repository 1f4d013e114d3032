"""``python -m data_pipelines.parquet SRC OUT``: converter of Hugging Face parquet files that hold their images as bytes.

::

    python -m data_pipelines.parquet cc3m/data shards/cc3m
    python -m data_pipelines.parquet 'vqa/train-*.parquet' shards/vqa --question question --answer multiple_choice_answer
    python -m data_pipelines.parquet llava-onevision/figureqa shards/figureqa
    python -m data_pipelines.parquet art shards/art --task text_to_image --image image --text title

An image column holds bytes, or structs ``{"bytes", "path"}`` as the datasets library writes them, or lists of either. What a row
becomes is detected by the names and types of the columns, and printed; options overrule it:

* ``editing``: an image to generate and an instruction, under the names that data_pipelines.converters.editing knows;
* ``conversations``: a column of turns (from/value, role/content), or ``texts`` of ``{"user", "assistant"}`` (The Cauldron);
* ``vqa``: question and answer (of a list of answers the most frequent one; all of them in ``answers``);
* ``captions``: a text; with ``--task text_to_image`` the image is to be generated instead of described.

Written are OUT/train/TASK-000000.tar and so on.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.command import Parser, run
from data_pipelines.converters.converting import Made, Noted, converter_parser
from data_pipelines.converters.editing import INPUTS, INSTRUCTIONS, LONGEST_NOTE, TARGETS, Keys, convert_rows, samples_of
from data_pipelines.converters.files import image_members
from data_pipelines.converters.llava_json import reconcile
from data_pipelines.converters.tables import Table
from data_pipelines.converters.texts import from_json, notes, place_markers, task_and_kind, without_markers, wording
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import INSTRUCTION, read_turns
from umm_zoo.conversation import Conversation, Turn
from umm_zoo.errors import UserError, locating, printable

TASKS = ("captions", "text_to_image", "vqa", "conversations", "editing")
_IMAGES = ("image", "images", "jpg", "png", "webp", "img", "picture", "pictures", "image_bytes")
_TEXTS = ("caption", "captions", "text", "txt", "TEXT", "prompt", "description", "sentence", "sentences", "title", "label_text")
_QUESTIONS = ("question", "questions", "query")
_ANSWERS = ("multiple_choice_answer", "answer", "answers", "label")
_TURNS = ("conversations", "conversation", "messages", "texts")
#: ``task`` and ``kind`` of a sample.
_NAMES = {
    "captions": ("caption", "caption"),
    "text_to_image": ("text_to_image", "text_to_image"),
    "vqa": ("questions", "vqa"),
    "conversations": ("conversation", "conversation"),
}


@dataclass(frozen=True)
class Columns:
    """Columns that are read, and what a row becomes."""

    task: str
    image: str | None
    text: str | None = None
    answer: str | None = None

    def __str__(self) -> str:
        parts = {"image": self.image, "text": self.text, "answer": self.answer}
        return f"{self.task}: " + ", ".join(f"{what} in '{name}'" for what, name in parts.items() if name)


def choose_columns(kinds: dict[str, str], arguments: argparse.Namespace) -> Columns:
    """The columns that the user named, and for the rest those that look like it, by their ``kinds``."""
    for option in ("image", "text", "question", "answer", "turns"):
        name = getattr(arguments, option)
        if name is not None and name not in kinds:
            raise UserError(f"--{option}", f"'{name}'", f"one of the columns {', '.join(kinds)}")
    images = [name for name, kind in kinds.items() if kind == "image"]
    image = arguments.image or _known(_IMAGES, images) or (images[0] if len(images) == 1 else None)
    texts = [name for name, kind in kinds.items() if kind in ("text", "number", "turns")]
    question = arguments.question or _known(_QUESTIONS, texts)
    answer = arguments.answer or _known(_ANSWERS, [name for name in kinds if name != question])
    written = [name for name, kind in kinds.items() if kind == "turns" or (kind == "text" and name in _TURNS[:3])]
    turns = arguments.turns or _known(_TURNS, written)
    text = arguments.text or _known(_TEXTS, texts)
    edited = _known(TARGETS, images) and _known(INPUTS, images) and _known(INSTRUCTIONS, texts)
    found = {"editing": edited, "conversations": turns, "vqa": question and answer, "captions": image and text}
    named = {"conversations": arguments.turns, "vqa": arguments.question, "captions": arguments.text}
    task = arguments.task or next((task for task, name in named.items() if name), None)
    task = task or next((task for task, there in found.items() if there), None)
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if task is None or not found["captions" if task == "text_to_image" else task]:
        wanted = f"columns for {task}" if task else "what a row is"
        hint = "name them with --image, --text, --question, --answer"
        raise UserError("", f"cannot tell {wanted}; the columns are {listed}", hint=hint)
    if task == "editing":
        return Columns(task, None)
    if image is None and task != "conversations":
        raise UserError("", f"cannot tell the image's column; the columns are {listed}", hint="name it with --image")
    read = {"vqa": question, "conversations": turns}.get(task, text)
    return Columns(task, image, read, answer if task == "vqa" else None)


def _known(names: Sequence[str], there: Sequence[str]) -> str | None:
    return next((name for name in names if name in there), None)


def sample_of(row: dict[str, Any], number: int, columns: Columns, size: int | None) -> Iterator[Made]:
    """The sample of one row."""
    cells = row.get(columns.image) if columns.image else None
    listed = cells if isinstance(cells, list) else [cells]
    cells = [cell for cell in listed if cell is not None]
    if 0 < len(cells) < len(listed):
        raise BadSampleError(f"missing image: {len(listed) - len(cells)} of a list of {len(listed)} are empty")
    text = row.get(columns.text or "")
    extra: dict[str, Any] = {}
    repairs: list[str] = []
    conversation: Conversation
    if columns.task == "conversations":
        conversation, repairs = reconcile(_turns(text), len(cells))
    elif not cells:
        raise BadSampleError("missing image: the cell is empty")
    elif columns.task == "vqa":
        answer, extra = _answer(row.get(columns.answer or ""))
        conversation = [Turn(role="user", text=wording(text, number)), Turn(role="assistant", text=answer)]
    else:
        conversation = [Turn(role="user", text=without_markers(wording(text, number)))]
        if columns.task == "captions":
            conversation = [Turn(role="user", text=INSTRUCTION), Turn(role="assistant", text=conversation[0]["text"])]
    if columns.task in ("vqa", "captions"):
        place_markers(conversation, len(cells))
    used = {columns.image, columns.text, columns.answer, "task", "kind", "conversations"}
    task, kind = _NAMES[columns.task]
    content = {**notes(row, used, LONGEST_NOTE), **extra, **task_and_kind(row, task, kind), "conversations": conversation}
    is_target = columns.task == "text_to_image"
    if is_target and len(cells) != 1:
        raise BadSampleError(f"several images to generate: {len(cells)}")
    images = image_members([] if is_target else cells, cells[0] if is_target else None, None, size)
    yield from map(Noted, repairs)
    yield {"__key__": f"{number:08d}", "json": content, **images}


def _answer(cell: Any) -> tuple[str, dict[str, Any]]:
    """The most frequent of several answers (VQAv2's are ``{"answer": …}``); the first of those wins that are equally frequent.

    Several may be JSON text; a list of numbers is one answer, a box.
    """
    if isinstance(several := from_json(cell), list) and all(isinstance(item, str | dict) for item in several):
        cell = several
    answers = [item.get("answer") if isinstance(item, dict) else item for item in (cell if isinstance(cell, list) else [cell])]
    answers = [answer for answer in answers if not (isinstance(answer, float) and not math.isfinite(answer))]  # NaN: there is none
    texts = [str(answer).strip() for answer in answers if isinstance(answer, str | int | float) and str(answer).strip()]
    if not texts:
        raise BadSampleError(f"empty answer: {cell!r}"[:200])
    return Counter(texts).most_common(1)[0][0], {"answers": texts} if len(texts) > 1 else {}


def _turns(cell: Any) -> Conversation:
    """Turns in any of the usual writings, JSON text included."""
    cell = from_json(cell)
    if isinstance(cell, list) and cell and all(isinstance(turn, dict) and "user" in turn for turn in cell):
        roles = ("user", "assistant")
        cell = [{"role": role, "text": turn[role]} for turn in cell for role in roles if isinstance(turn.get(role), str)]
    return read_turns(cell)


def parser() -> Parser:
    """The command line."""
    made = converter_parser(__doc__, "a parquet file, a folder of them, or a glob", unit="rows")
    made.add_argument("--task", choices=TASKS, help="what a row becomes (where None: detected)")
    for name, what in (
        ("image", "the image or images"),
        ("text", "the caption or prompt"),
        ("question", "the question"),
        ("answer", "the answer or answers"),
        ("turns", "a conversation's turns"),
    ):
        made.add_argument(f"--{name}", metavar="COLUMN", help=f"column of {what} (where None: detected)")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert and report."""
    from rich.console import Console

    table, size = Table(arguments.source), arguments.image_size
    with locating(arguments.source):
        columns = choose_columns(table.kinds, arguments)
    Console(stderr=True).print(printable(str(columns)), highlight=False, markup=False)
    make: Callable[[int], Iterable[Made]]
    if columns.task == "editing":
        make = lambda number: samples_of(table, number, Keys(), size=size)  # noqa: E731
    else:
        unread = {name for name, kind in table.kinds.items() if kind == "image"} - {columns.image}
        table.columns = [name for name in table.kinds if name not in unread]
        ignored = [Noted(f"image in the column '{name}' that is not converted") for name in sorted(unread)]
        make = lambda number: [*sample_of(table[number], number, columns, size), *ignored]  # noqa: E731
    convert_rows(arguments, table, columns.task, make)


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
