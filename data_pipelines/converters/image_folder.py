"""``python -m data_pipelines.image_folder SRC OUT``: converter of class folders of photos to questions and captions.

``SRC/train/CLASS/*.jpg`` (with ``val`` or ``test`` beside) keeps its splits; ``SRC/CLASS/*.jpg`` is split by ``--val-share``.
Written are OUT/SPLIT/questions-000000.tar and OUT/SPLIT/captions-000000.tar, and so on. Hidden files, files beside the class
folders and files of other suffixes than an image's are counted in the report; of a table beside the images (metadata.jsonl,
captions.csv) it is said that data_pipelines.table reads it.
"""

from __future__ import annotations

import argparse
import random
import shlex
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.command import Parser, run, share
from data_pipelines.converters.converting import SPLITS, Part, convert, converter_parser, split_of
from data_pipelines.converters.files import image_members, is_hidden
from data_pipelines.converters.rows import read_json
from data_pipelines.converters.sources import TABLES
from data_pipelines.converters.texts import with_article
from data_pipelines.tasks import IMAGE_TYPES, INSTRUCTION, question_and_answer
from umm_zoo.errors import UserError, note, printable


@dataclass(frozen=True)
class Photo:
    """File of a class folder."""

    file: str  # inside SRC
    name: str
    split: str
    number: int


def find_photos(source: Path, val_share: float, seed: int, names: dict[str, str]) -> tuple[list[Photo], list[str], dict[str, str]]:
    """Photos of every split in a shuffled order, by their paths and the seed alone; class names; refused files, and why."""
    if not source.is_dir():
        raise UserError(source, "no such folder")
    # a folder called train with files in it and no folders is a class: photos of trains
    splits = {path.name: SPLITS[path.name.lower()] for path in _folders(source) if path.name.lower() in SPLITS and _folders(path)}
    keeps_splits = bool(splits) and (set(splits.values()) != {"train"} or val_share == 0)
    found: list[tuple[str, str, str]] = []
    refused: dict[str, str] = {}
    visited = {source / name for name in splits}
    spellings: dict[
        str, str
    ] = {}  # "Sea lion" and "sea_lion" are one class: its photos must not be the no of the other's questions
    for root, split in [(source / name, split) for name, split in splits.items()] or [(source, "")]:
        for folder in _folders(root):
            visited.add(folder)
            name = names.get(folder.name) or folder.name.replace("_", " ").replace("-", " ").strip() or folder.name
            name = unicodedata.normalize("NFC", name)  # macOS writes the other normal form
            name = spellings.setdefault(name.casefold(), name)
            for path in _files(folder):
                file = path.relative_to(source).as_posix()
                if reason := _why_not(path, file) or (
                    "class name that is not UTF-8" if name.encode(errors="ignore").decode() != name else ""
                ):
                    refused[file] = reason
                else:
                    found.append((file, name, split if keeps_splits else split_of(file, val_share, seed)))
    taken = {file for file, _, _ in found} | refused.keys()
    for path in _files(source):
        if (file := path.relative_to(source).as_posix()) not in taken and path not in visited:
            refused[file] = "hidden file" if is_hidden(file) else "file outside of the class folders"
    classes = sorted({name for _, name, _ in found})
    hint = ""
    if tables := [source / file for file in refused if Path(file).suffix.lower() in TABLES and not is_hidden(file)]:
        hint = f"`python -m data_pipelines.table {shlex.quote(str(tables[0]))} OUT` converts it"
        note(f"{', '.join(map(str, tables[:3]))}{' …' * (len(tables) > 3)}: not read, the classes are those of the folders; {hint}")
    if not found:
        raise UserError(source, f"no images in class folders ({source}/CLASS/*.jpg or {source}/train/CLASS/*.jpg)", hint=hint)
    if len(classes) < 2:
        raise UserError(source, f"one class, '{classes[0]}'", "at least two class folders to ask about", hint)
    random.Random(seed).shuffle(found)  # neighbours in a shard should not be of one class
    return [Photo(file, name, split, number) for number, (file, name, split) in enumerate(found)], classes, refused


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _why_not(path: Path, file: str) -> str:
    """The reason why a file of a class folder is no photo; empty where it is one."""
    if is_hidden(file):
        return "hidden file"
    if path.is_dir():
        return "link to a folder, which is not followed"
    if path.suffix.lower().lstrip(".") not in IMAGE_TYPES:
        return f"no image by its suffix '{path.suffix}'"
    return "" if path.is_file() else "no plain file"


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
    return {**row, "class": photo.name, "file": printable(photo.file)}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


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
    if not isinstance(names, dict) or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise UserError("--names", f"no map from texts to texts in {arguments.names}", '{"n02084071": "dog"}')
    source, seed, size = arguments.source, arguments.seed, arguments.image_size
    photos, classes, refused = find_photos(source, arguments.val_share, seed, names)
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
    convert(arguments, parts, refused, names=names)


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
