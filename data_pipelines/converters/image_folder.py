"""``python -m data_pipelines.image_folder SRC OUT``: class folders of photos become questions, yes/no questions and captions.

``SRC/train/CLASS/*.jpg`` (with ``val`` or ``test`` beside) keeps its splits; ``SRC/CLASS/*.jpg`` is split by ``--val-share``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.converters.converting import Parser, Part, convert, print_report, run, split_of
from data_pipelines.converters.files import stored_image
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import IMAGE_TYPES

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_AN_BEFORE = ("hour", "honest", "honour", "honor", "heir")
_A_BEFORE = ("uni", "use", "usu", "euro", "ewe", "one", "once", "ukulele", "utensil")


@dataclass(frozen=True)
class Photo:
    """One file of a class folder."""

    path: Path
    name: str
    split: str
    number: int


def with_article(noun: str) -> str:
    """``noun`` with "a" or "an", by its sound as far as spelling tells."""
    word = noun.lower()
    vowel = word.startswith(_AN_BEFORE) or (word[:1] in tuple("aeiou") and not word.startswith(_A_BEFORE))
    return f"{'an' if vowel else 'a'} {noun}"


def find_photos(source: Path, val_share: float, seed: int, names: dict[str, str]) -> tuple[list[Photo], list[str]]:
    """The photos of every split in a shuffled order that depends on nothing but their paths and the seed, and the class names.

    Raises:
        FileNotFoundError: no such folder, or no image in class folders.
        ValueError: fewer than two classes, or two folders of one split mean the same class.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    splits = {folder: _SPLITS[folder.name.lower()] for folder in _folders(source) if folder.name.lower() in _SPLITS}
    roots = splits or {source: ""}
    found: list[tuple[Path, str, str]] = []
    for root, split in roots.items():
        for folder in _folders(root):
            name = names.get(folder.name) or folder.name.replace("_", " ").replace("-", " ").strip()
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower().lstrip(".") in IMAGE_TYPES and path.is_file():
                    found.append((path, name, split or split_of(path.relative_to(source).as_posix(), val_share, seed)))
    classes = sorted({name for _, name, _ in found})
    if not found:
        raise FileNotFoundError(f"{source}: no images in class folders ({source}/CLASS/*.jpg or {source}/train/CLASS/*.jpg)")
    if len(classes) < 2:
        raise ValueError(f"{source}: found one class, '{classes[0]}'; questions need at least two class folders")
    if set(splits.values()) == {"train"} and val_share > 0:
        found = [(path, name, split_of(path.relative_to(source).as_posix(), val_share, seed)) for path, name, _ in found]
    random.Random(seed).shuffle(found)  # neighbours in a shard should not be of one class
    return [Photo(path, name, split, number) for number, (path, name, split) in enumerate(found)], classes


def questions_of(photo: Photo, source: Path, classes: list[str], seed: int, size: int | None) -> Iterator[dict[str, Any]]:
    """ "What is in the picture?", and whether its class (yes) and another one (no) are there."""
    kind, content = encode(photo.path, size)
    other = random.Random(f"{seed} {photo.number}").choice([name for name in classes if name != photo.name])
    asked = [
        ("class", "What is in the picture?", photo.name, photo.name),
        ("exists", f"Is there {with_article(photo.name)} in the picture?", "yes", photo.name),
        ("exists", f"Is there {with_article(other)} in the picture?", "no", other),
    ]
    for place, (question, text, answer, about) in enumerate(asked):
        row = _row(photo, source, "questions", question, text, answer)
        row["object"] = about
        yield {"__key__": f"questions-{photo.number:08d}-{place}", "json": row, f"0.{kind}": content}


def caption_of(photo: Photo, source: Path, size: int | None) -> Iterator[dict[str, Any]]:
    """ "A photo of an airplane."."""
    kind, content = encode(photo.path, size)
    row = _row(photo, source, "captions", "caption", "Describe the image.", f"A photo of {with_article(photo.name)}.")
    yield {"__key__": f"captions-{photo.number:08d}", "json": row, f"0.{kind}": content}


def encode(path: Path, size: int | None) -> tuple[str, bytes]:
    """File type and bytes of a photo: as they are, or with the short edge shrunk to ``size``.

    Raises:
        BadSampleError: the file is no image that a loader would accept.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadSampleError(f"cannot be read ({error.strerror})") from error
    return stored_image(content, size, min)


def _row(photo: Photo, source: Path, task: str, kind: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "text": f"<image>\n{question}"}, {"role": "assistant", "text": answer}]
    file = photo.path.relative_to(source).as_posix()
    return {"task": task, "kind": kind, "split": photo.split, "conversations": turns, "class": photo.name, "file": file}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="python -m data_pipelines.image_folder",
        description="Class folders of photos to shards: OUT/SPLIT/questions-000000.tar and OUT/SPLIT/captions-000000.tar.",
        epilog="A stopped conversion goes on when it is started again. The shards hold copies of the photos.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("source", type=Path, metavar="SRC", help="SRC/CLASS/*.jpg, or SRC/train/CLASS/*.jpg with val or test beside")
    made.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    made.add_argument("--image-size", type=int, metavar="N", help="shrink the short edge to N pixels (never enlarges)")
    made.add_argument(
        "--val-share", type=float, default=0.1, help="share of photos held out where SRC has no val or test of its own"
    )
    made.add_argument("--names", type=Path, metavar="FILE", help="json map from folder names to class names (n02084071: dog)")
    made.add_argument("--photos-per-shard", type=int, default=500, metavar="N", help="photos of one tar")
    made.add_argument("--seed", type=int, default=0, help="order of the photos, split, and classes asked for in vain")
    made.add_argument("--overwrite", action="store_true", help="replace the outcome of an earlier conversion")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert and report.

    Raises:
        ValueError: an argument outside its range, or a folder that holds something else.
        FileNotFoundError: there are no photos.
    """
    for option, value in (("--image-size", arguments.image_size), ("--photos-per-shard", arguments.photos_per_shard)):
        if value is not None and value < 1:
            raise ValueError(f"{option}: found {value}, expected positive whole numbers")
    if not 0 <= arguments.val_share < 1:
        raise ValueError(f"--val-share: found {arguments.val_share}, expected 0 to below 1")
    names = json.loads(arguments.names.read_text(encoding="utf-8")) if arguments.names else {}
    source, seed, size = arguments.source, arguments.seed, arguments.image_size
    photos, classes = find_photos(source, arguments.val_share, seed, names)
    makers: dict[str, Callable[[Photo], Iterator[dict[str, Any]]]] = {
        "questions": lambda photo: questions_of(photo, source, classes, seed, size),
        "captions": lambda photo: caption_of(photo, source, size),
    }
    parts = [
        Part(
            f"{split}/{task}",
            [photo for photo in photos if photo.split == split],
            make,
            lambda photo: photo.path.relative_to(source).as_posix(),
            arguments.photos_per_shard,
        )
        for split in sorted({photo.split for photo in photos}, key=["train", "val", "test"].index)
        for task, make in makers.items()
    ]
    kept = {"image_size": size, "val_share": arguments.val_share, "seed": seed, "names": names}
    kept["photos_per_shard"] = arguments.photos_per_shard
    print_report(arguments.out, convert(arguments.out, kept, parts, arguments.overwrite))


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(parser().parse_args())))
