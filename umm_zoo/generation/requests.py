"""Requests to a finished run and their results, and files of requests. Nothing here imports torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umm_zoo.conversation import IMAGE_MARKER, Conversation
from umm_zoo.errors import UserError, did_you_mean, printable
from umm_zoo.generation.options import MAX_SEED, shortened, shown

if TYPE_CHECKING:
    from PIL import Image

    from umm_zoo.backbones.answers import Answer


@dataclass
class Request:
    """Question or prompt, the images it is about, its settings by name, and where it stands.

    Args:
        images: of earlier turns first.
        question: its text.
        settings: by name.
        place: where it stands, for messages.
        earlier: turns before it, with a marker for each of their images.
        watch: called with the answer so far, after each of its tokens; whether it shall go on.
    """

    images: Sequence[Path | Image.Image]
    question: str
    settings: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    earlier: Conversation = field(default_factory=list)
    watch: Callable[[Answer], bool] | None = None

    @property
    def name(self) -> str:
        """The line of the file, or the images and the question, for messages."""
        question = [f"'{shortened(self.question)}'"] if self.question or not self.images else []
        return self.place or " ".join([*(name_of(image) for image in self.images), *question])

    @property
    def num_earlier_images(self) -> int:
        """Images of earlier turns."""
        return sum(turn["text"].count(IMAGE_MARKER) for turn in self.earlier if turn["role"] == "user")

    def seed_after_seed(self) -> list[Request]:
        """The requests that one with a ``num`` stands for.

        Raises:
            UserError: the last seed is none that generators take.
        """
        settings = dict(self.settings)
        num, seed = settings.pop("num", 1), settings["seed"]
        if seed + num - 1 > MAX_SEED:
            raise UserError(self.place or "--seed", f"seed {seed} for {num} images", f"a last seed of at most {MAX_SEED}")
        return [replace(self, settings={**settings, "seed": seed + k}) for k in range(num)]


def name_of(image: Path | Image.Image) -> str:
    """A file by its path, an image from Python by its size."""
    return printable(str(image)) if isinstance(image, Path) else f"an image of {image.width} x {image.height} px"


@dataclass
class Result:
    """Result of a request: a text, or images by name; and how alike the first image and its input are, by encoder."""

    request: Request
    answer: str | None = None
    images: dict[str, Image.Image] = field(default_factory=dict)
    similarities: dict[str, float] = field(default_factory=dict)
    tokens: Answer | None = None  #: of the answer, where the method tells
    remark: str = ""  #: on how it was made, where that is not as asked for


def check_images(requests: list[Request]) -> None:
    """Open every image once, before a model is loaded and works for hours.

    Raises:
        UserError: names the first that is missing or cannot be read, and its line of the file.
    """
    from umm_zoo.generation.images import open_image

    seen = set()
    for request in requests:
        for path in request.images:
            if isinstance(path, Path) and path not in seen:
                open_image(path, request.place)
                seen.add(path)


def read_rows(file: Path, plain: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, request as a map) of every line of a JSONL file, or of a ``plain`` one with a question per line; empty lines count.

    Raises:
        UserError: the file cannot be read, is no text in UTF-8 or UTF-16 with its mark, or a line is no JSON object.
    """
    found = False
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        found, place = True, f"{file}: line {number}"
        yield place, {"question": line.strip()} if plain else _object(line, place)
    if not found:
        raise UserError(file, "no request", "one per line")


def _lines(file: Path) -> Iterator[str]:
    """Lines whatever system wrote them: a mark at the file's start, and each of the three ends of lines, are read over."""
    try:
        if not os.path.isfile(file):
            raise UserError(file, "a folder" if os.path.isdir(file) else "no such file", "a file of requests")
        content = file.read_bytes()
    except OSError as error:
        raise UserError(file, f"no readable file ({error.strerror})", "a file of requests") from error
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", content[: error.start])) + 1
        found = f"a byte that is not {encoding.removesuffix('-sig').upper()} (0x{content[error.start]:02x})"
        raise UserError(f"{file}: line {line}", found, "a file saved in UTF-8") from None
    return iter(re.split(r"\r\n|\r|\n", text))


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=lambda pairs: _unique(pairs, place), parse_constant=_refuse)
    except UserError:
        raise
    except (ValueError, RecursionError):  # no JSON, numbers of thousands of digits, brackets a thousand deep
        row = None
    if not isinstance(row, dict):
        raise UserError(
            place, f"'{shortened(line.strip())}'", 'one JSON object per line: {"images": ["one.png", ...], "question": "..."}'
        )
    return row


def _unique(pairs: list[tuple[str, Any]], place: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise UserError(place, f"the key {shown(key)} twice", "each key once")
        row[key] = value
    return row


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def images_in(row: Mapping[str, Any], folder: Path, place: str) -> list[Path]:
    """The images of a line, whose paths start from the file's own folder."""
    images = row.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise UserError(f"{place}: images", shown(images), 'a list of files: ["one.png", ...]')
    return [folder / image for image in images]


def check_keys(row: Mapping[str, Any], known: list[str], place: str) -> None:
    """Refuse keys that a line of this command does not have."""
    for key in row:
        if key not in known:
            hint = "the prompt stands under 'question'" if key in ("prompt", "instruction", "text") else did_you_mean(key, known)
            raise UserError(place, f"an unknown key {shown(key)}", ", ".join(known), hint)


def question_in(row: Mapping[str, Any], default: str | None, place: str) -> str:
    """The question of a line."""
    question = row.get("question", default)
    if question is None:
        raise UserError(place, "no question", '"question": "..."')
    if not isinstance(question, str):
        raise UserError(f"{place}: question", shown(question), "a text")
    return question
