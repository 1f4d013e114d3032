"""Columns of a table: what they hold, by their names and by their cells, and what a row becomes."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.converters.editing import INPUTS, INSTRUCTIONS, TARGETS
from data_pipelines.converters.rows import IMAGE_NAME
from data_pipelines.converters.texts import from_json
from umm_zoo.errors import UserError

TASKS = ("captions", "text_to_image", "questions", "conversations", "editing")
_IMAGES = (
    *("image", "images", "jpg", "png", "webp", "img", "imgs", "picture", "pictures", "photo", "photos", "image_bytes"),
    *("image_file", "image_name", "img_name", "image_id", "file_name", "filename", "file", "file_path", "filepath", "path"),
)
_CAPTIONS = (
    *("caption", "captions", "text", "texts", "txt", "description", "descriptions", "sentence", "sentences", "comment"),
    *("title", "label_text", "alt_text"),
)
_PROMPTS = ("prompt", "prompts")
_QUESTIONS = ("question", "questions", "query", "instruction", "prompt")
_ANSWERS = ("multiple_choice_answer", "answer", "answers", "response", "output", "completion", "label")
_TURNS = ("conversations", "conversation", "messages", "dialogue", "dialog", "texts")
_SPLITS = ("split",)
ADDRESS = re.compile(r"(https?|ftp|s3|gs|hf)://", re.IGNORECASE)
_FILE = re.compile(r"_(file_?names?|file_?paths?|paths?|files?|names?)$")


@dataclass(frozen=True)
class Columns:
    """Columns that are read, and what a row becomes.

    Args:
        images: the input images in order; of a text-to-image row the one to generate.
        texts: captions or prompts, each a text of its own; else the one question, instruction, or list of turns.
        target: the image to generate of an edit.
    """

    task: str
    images: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    answer: str | None = None
    target: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        parts = {
            "image": self.images,
            "text": self.texts,
            "answer": (self.answer,),
            "target": (self.target,),
            "split": (self.split,),
        }
        named = {what: [f"'{name}'" for name in names if name] for what, names in parts.items()}
        return f"{self.task}: " + "; ".join(f"{what} in {', '.join(names)}" for what, names in named.items() if names)

    @property
    def used(self) -> set[str]:
        """The columns that are read."""
        return {*self.images, *self.texts, *(name for name in (self.answer, self.target, self.split) if name)}


def kinds_of(names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the columns hold by some rows: ``image``, ``address``, ``turns``, ``text``, ``number``, or ``empty``."""
    kinds = {}
    for name in names:
        found = Counter(kind for row in rows if (kind := _kind(row.get(name))))
        kinds[name] = "turns" if found["turns"] else max(found, key=lambda kind: found[kind]) if found else "empty"
        if kinds[name] == "number" and found["text"]:
            kinds[name] = "text"
    return kinds


def _kind(cell: Any) -> str:
    """What a cell holds; empty where nothing."""
    cell = from_json(cell)
    if isinstance(cell, list):
        kinds = {_kind(one) for one in cell} - {""}
        return "turns" if "turns" in kinds else min(kinds, default="")
    if isinstance(cell, dict):
        known = cell.keys() & {"value", "content", "user", "text"}
        return "image" if "bytes" in cell else "turns" if known else "image" if "path" in cell else "text"
    if isinstance(cell, bytes):
        return "image"
    if isinstance(cell, str):
        text = cell.strip()
        if text and IMAGE_NAME.search(text) and not ADDRESS.match(text):
            return "image"
        return "address" if ADDRESS.match(text) and " " not in text else "text" if text else ""
    return "number" if isinstance(cell, int | float) else ""


def plain_name(name: str, is_image: bool = False) -> str:
    """The name of a column as others write it: ``Source Image`` is source_image, and of images target_file_name is target."""
    plain = re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_")
    return (plain if plain in _IMAGES else _FILE.sub("", plain)) if is_image else plain


def choose_columns(kinds: Mapping[str, str], arguments: argparse.Namespace) -> Columns:
    """The columns that the user named, and for the rest those that look like it, by their ``kinds``.

    Raises:
        UserError: a column is not there, or nothing tells what a row is.
    """
    for option in ("image", "text", "question", "answer", "turns", "input", "instruction", "target", "split"):
        for name in getattr(arguments, option) or ():
            if name not in kinds:
                raise UserError(f"--{option}", f"'{name}'", f"one of the columns {', '.join(kinds)}")
    found = _Choice(kinds, arguments)
    return found.columns()


class _Choice:
    """Search for what each column is."""

    def __init__(self, kinds: Mapping[str, str], arguments: argparse.Namespace) -> None:
        self.kinds, self.arguments = kinds, arguments
        self.image_columns = {name: plain_name(name, True) for name, kind in kinds.items() if kind == "image"}
        texts = {name: plain_name(name) for name, kind in kinds.items() if kind in ("text", "number", "turns", "other")}
        if not self.image_columns:  # names without a suffix, as ids are
            self.image_columns = dict([pair for pair in texts.items() if pair[1] in _IMAGES][:1])
        self.texts = {name: plain for name, plain in texts.items() if name not in self.image_columns}
        self.listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())

    def columns(self) -> Columns:
        """The columns, or a user error."""
        given = {
            name: tuple(value) if (value := getattr(self.arguments, name)) else ()
            for name in ("image", "text", "question", "answer", "turns", "input", "instruction", "target", "split")
        }
        answer = given["answer"] or _family(_ANSWERS, self.texts)[:1]
        question = (
            given["question"] or _family(_QUESTIONS, {name: plain for name, plain in self.texts.items() if name not in answer})[:1]
        )
        written = {name: plain for name, plain in self.texts.items() if self.kinds[name] == "turns" or plain in _TURNS[:3]}
        turns = given["turns"] or _family(_TURNS, written)[:1] or tuple(written)[: len(written) == 1]
        captions = given["text"] or _family(_CAPTIONS, self.texts)
        prompts = given["text"] or captions or _family(_PROMPTS, self.texts)
        target = given["target"] or _family(TARGETS, self.image_columns)[:1]
        inputs = given["input"] or _family(
            INPUTS, {name: plain for name, plain in self.image_columns.items() if name not in target}
        )
        instruction = given["instruction"] or _family(INSTRUCTIONS, self.texts)[:1]
        image = given["image"] or _family(_IMAGES, self.image_columns) or tuple(self.image_columns)[: len(self.image_columns) == 1]
        found: dict[str, Sequence[str]] = {
            "editing": target and inputs and instruction,
            "conversations": turns,
            "questions": question and answer,
            "captions": image and captions,
            "text_to_image": image and prompts,
        }
        named = {
            "editing": given["instruction"] or given["target"],
            "conversations": given["turns"],
            "questions": given["question"],
        }
        task: str | None = self.arguments.task or next((task for task, names in named.items() if names), None)
        task = task or ("text_to_image" if not given["text"] and image and image == target and prompts else None)
        task = task or ("captions" if given["text"] else None) or next((task for task, names in found.items() if names), None)
        if task is None or not found[task]:
            raise self._refusal(f"columns for {task}" if task else "what a row is")
        if not image and task not in ("conversations", "editing"):
            raise self._refusal("the image's column")
        split = given["split"] or _family(_SPLITS, self.texts)[:1]
        images = {"editing": inputs, "text_to_image": image[:1]}.get(task, image)
        texts = {"editing": instruction, "conversations": turns, "questions": question, "text_to_image": prompts}.get(
            task, captions
        )
        return Columns(
            task,
            tuple(images),
            tuple(texts),
            answer[0] if task == "questions" else None,
            target[0] if task == "editing" else None,
            split[0] if split else None,
        )

    def _refusal(self, what: str) -> UserError:
        if not self.image_columns and (addresses := [name for name, kind in self.kinds.items() if kind == "address"]):
            found = f"the images are addresses ('{addresses[0]}'), and nothing is downloaded"
            return UserError("", found, hint="img2dataset fetches them, and data_pipelines.img2dataset converts what it wrote")
        hint = "name them with --image, --text, --question and --answer, --turns, or --input, --instruction and --target"
        return UserError("", f"cannot tell {what}; the columns are {self.listed}", hint=hint)


def _family(known: Sequence[str], there: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of the first known name that is there, with their numbered kin (``caption``, ``caption_1``, ``caption 2``)."""
    for name in known:
        kin = tuple(column for column, plain in there.items() if plain == name or re.fullmatch(rf"{re.escape(name)}_?\d+", plain))
        if kin:
            return kin
    return ()
