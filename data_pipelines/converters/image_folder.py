"""``python -m data_pipelines.image_folder SRC OUT``: converter of class folders of photos to questions and captions.

``SRC/train/CLASS/*.jpg`` (with ``val`` or ``test`` beside) keeps its splits; ``SRC/CLASS/*.jpg`` is split by ``--val-share``.
Written are OUT/SPLIT/questions-000000.tar and OUT/SPLIT/captions-000000.tar, and so on.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.command import Parser, run, share
from data_pipelines.converters.converting import Part, convert, converter_parser, split_of
from data_pipelines.converters.files import image_members
from data_pipelines.converters.rows import read_json
from data_pipelines.converters.texts import with_article
from data_pipelines.tasks import IMAGE_TYPES, INSTRUCTION, question_and_answer
from umm_zoo.errors import UserError

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Photo:
    """File of a class folder."""

    file: str  # inside SRC
    name: str
    split: str
    number: int


def find_photos(source: Path, val_share: float, seed: int, names: dict[str, str]) -> tuple[list[Photo], list[str]]:
    """The photos of every split in a shuffled order that depends on nothing but their paths and the seed, and the class names."""
    if not source.is_dir():
        raise UserError(source, "no such folder")
    splits = {folder: _SPLITS[folder.name.lower()] for folder in _folders(source) if folder.name.lower() in _SPLITS}
    keeps_splits = bool(splits) and (set(splits.values()) != {"train"} or val_share == 0)
    found: list[tuple[str, str, str]] = []
    for root, split in (splits or {source: ""}).items():
        for folder in _folders(root):
            name = names.get(folder.name) or folder.name.replace("_", " ").replace("-", " ").strip()
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower().lstrip(".") in IMAGE_TYPES and path.is_file():
                    file = path.relative_to(source).as_posix()
                    found.append((file, name, split if keeps_splits else split_of(file, val_share, seed)))
    classes = sorted({name for _, name, _ in found})
    if not found:
        raise UserError(source, f"no images in class folders ({source}/CLASS/*.jpg or {source}/train/CLASS/*.jpg)")
    if len(classes) < 2:
        raise UserError(source, f"one class, '{classes[0]}'", "at least two class folders to ask about")
    random.Random(seed).shuffle(found)  # neighbours in a shard should not be of one class
    return [Photo(file, name, split, number) for number, (file, name, split) in enumerate(found)], classes


def questions_of(photo: Photo, source: Path, classes: list[str], seed: int, size: int | None) -> Iterator[dict[str, Any]]:
    """ "What is in the picture?", and whether its class (yes) and another one (no) are there."""
    other = random.Random(f"{seed} {photo.number}").choice([name for name in classes if name != photo.name])
    asked = [
        ("class", "What is in the picture?", photo.name, photo.name),
        ("exists", f"Is there {with_article(photo.name)} in the picture?", "yes", photo.name),
        ("exists", f"Is there {with_article(other)} in the picture?", "no", other),
    ]
    image = image_members([photo.file], None, source, size, min)
    for place, (question, text, answer, about) in enumerate(asked):
        row = {**_row(photo, "questions", question, text, answer), "object": about}
        yield {"__key__": f"questions-{photo.number:08d}-{place}", "json": row, **image}


def caption_of(photo: Photo, source: Path, size: int | None) -> Iterator[dict[str, Any]]:
    """ "A photo of an airplane."."""
    row = _row(photo, "captions", "caption", INSTRUCTION, f"A photo of {with_article(photo.name)}.")
    yield {"__key__": f"captions-{photo.number:08d}", "json": row, **image_members([photo.file], None, source, size, min)}


def _row(photo: Photo, task: str, kind: str, question: str, answer: str) -> dict[str, Any]:
    row = {"task": task, "kind": kind, "split": photo.split, "conversations": question_and_answer(question, answer)}
    return {**row, "class": photo.name, "file": photo.file}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def parser() -> Parser:
    """The command line."""
    source = "SRC/CLASS/*.jpg, or SRC/train/CLASS/*.jpg with val or test beside"
    made = converter_parser(__doc__, source, unit="photos", per_shard=500, edge="short")
    made.add_argument("--val-share", type=share, default=0.1, help="share of photos held out where SRC has no val or test")
    made.add_argument("--names", type=Path, metavar="FILE", help="json map from folder names to class names (n02084071: dog)")
    made.add_argument("--seed", type=int, default=0, help="order of the photos, split, and classes asked for in vain")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert and report."""
    names = read_json(arguments.names) if arguments.names else {}
    source, seed, size = arguments.source, arguments.seed, arguments.image_size
    photos, classes = find_photos(source, arguments.val_share, seed, names)
    makers: dict[str, Callable[[Photo], Iterator[dict[str, Any]]]] = {
        "questions": lambda photo: questions_of(photo, source, classes, seed, size),
        "captions": lambda photo: caption_of(photo, source, size),
    }
    parts = [
        Part(f"{split}/{task}", chosen, make, lambda photo: photo.file, arguments.photos_per_shard)
        for split in ("train", "val", "test")
        for task, make in makers.items()
        if (chosen := [photo for photo in photos if photo.split == split])
    ]
    convert(arguments, parts, names=names)


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
