"""``python -m data_pipelines.coco SRC OUT``: COCO's captions, and questions made of its objects.

``SRC`` is the usual folder, with any of its files (``2014`` and lists of one's own in the same layout are understood as well)::

    SRC/annotations/captions_train2017.json   SRC/annotations/instances_val2017.json   SRC/train2017/*.jpg   SRC/val2017/*.jpg

    python -m data_pipelines.coco coco shards/coco
    python -m data_pipelines.coco coco shards/coco-small --splits val2017 --image-size 336 --exists-images 0 --count-images 1000

gives per split ``OUT/val2017/captions-*.tar``, ``exists-*.tar`` and ``count-*.tar``. The yes/no questions are POPE's (Li et al.,
2023, arXiv 2305.10355): images with more than three kinds of objects; for each of the settings random, popular and adversarial
as many questions about present objects as about absent ones, the absent ones drawn at random, the most frequent of the split, or
those seen most often together with what is there. Every question is a sample with its own copy of the image, hence the limits.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.converters.coco_objects import Objects, article, plural
from data_pipelines.converters.converting import Parser, Part, add_options, check_numbers, convert, print_report, run
from data_pipelines.converters.files import read_image
from data_pipelines.converters.markers import without_markers
from data_pipelines.decoding import BadSampleError

SETTINGS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Split:
    """One split: its images' folder, their file names by id, captions by id, and its objects."""

    name: str
    folder: Path
    files: dict[int, str]
    captions: dict[int, list[str]]
    objects: Objects


def find_splits(source: Path, images: Path | None, wanted: list[str] | None) -> list[Split]:
    """Read the annotations of every split that is there.

    Raises:
        FileNotFoundError: no annotations, no images of a split, or a wanted split is not there.
        ValueError: a file is not in COCO's layout.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    folder = source / "annotations" if (source / "annotations").is_dir() else source
    files = {path.stem: path for kind in ("captions", "instances") for path in sorted(folder.glob(f"{kind}_*.json"))}
    names = sorted({stem.split("_", 1)[1] for stem in files})
    if not names:
        raise FileNotFoundError(f"{folder}: found neither captions_*.json nor instances_*.json")
    for name in wanted or []:
        if name not in names:
            raise FileNotFoundError(f"--splits: found '{name}', there are {', '.join(names)}")
    return [_read_split(source, images, name, files) for name in wanted or names]


def _read_split(source: Path, images: Path | None, name: str, files: dict[str, Path]) -> Split:
    base = images or source
    places = [base / name, base / "images" / name, *([base] if images else [])]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{places[0]}: no such folder of images (nor {places[1]}); --images names another one")
    named: dict[int, str] = {}
    captions: dict[int, list[str]] = {}
    objects = Objects({}, {}, set())
    if path := files.get(f"captions_{name}"):
        content = _read(path, ("images", "annotations"))
        with _layout(path):
            named |= {image["id"]: image["file_name"] for image in content["images"]}
            for row in content["annotations"]:
                if caption := without_markers(str(row["caption"])):
                    captions.setdefault(row["image_id"], []).append(caption)
    if path := files.get(f"instances_{name}"):
        content = _read(path, ("images", "annotations", "categories"))
        with _layout(path):
            named |= {image["id"]: image["file_name"] for image in content["images"]}
            objects = Objects.from_instances(content)
    return Split(name, folder, named, captions, objects)


class _layout:  # noqa: N801 - reads as a statement
    """Says which file lacks which key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError | TypeError):
            raise ValueError(f"{self.path}: not COCO's layout ({type(error).__name__}: {error})") from error


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be parsed ({error})") from error
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"{path}: not COCO's layout, the list '{missing[0]}' is missing")
    return dict(content)


# -- samples -----------------------------------------------------------------------------------------------------------------


def caption_samples(split: Split, image: int, size: int | None, seed: int, every: bool) -> Iterator[dict[str, Any]]:
    """The image with one of its captions (all of them in ``captions``), or with each."""
    captions = split.captions[image]
    told = captions if every else [random.Random(f"{seed} {image}").choice(captions)]
    for place, caption in enumerate(told):
        row = {"task": "caption", "kind": "caption", **_turns("Describe the image.", caption), "captions": captions}
        yield _sample(split, image, f"captions-{image:012d}-{place}", row, size)


def exists_samples(split: Split, image: int, size: int | None, seed: int, pairs: int) -> Iterator[dict[str, Any]]:
    """For each of POPE's settings ``pairs`` questions about present objects and as many about absent ones.

    Raises:
        BadSampleError: nearly every object is in the image, so that absent ones do not suffice.
    """
    chance = random.Random(f"{seed} {image}")
    present = sorted(split.objects.present(image))
    positives = chance.sample(present, min(pairs, len(present)))
    absent = split.objects.absent(image)
    if len(absent) < len(positives):
        raise BadSampleError("too few absent objects: nearly every object is in the image")
    negatives = {
        "random": chance.sample(absent, len(positives)),
        "popular": split.objects.popular(image)[: len(positives)],
        "adversarial": split.objects.adversarial(image)[: len(positives)],
    }
    for setting in SETTINGS:
        asked = [question for pair in zip(positives, negatives[setting], strict=True) for question in pair]
        for place, name in enumerate(asked):
            answer = ("yes", "no")[place % 2]
            turns = _turns(f"Is there {article(name)} in the image?", answer)
            row = {"task": "questions", "kind": "exists", **turns, "negative": setting, "object": name}
            yield _sample(split, image, f"exists-{image:012d}-{setting}-{place}", row, size)


def count_samples(split: Split, image: int, size: int | None, seed: int, most: int) -> Iterator[dict[str, Any]]:
    """ "How many dogs are in the image?": a number is chosen first, then the object, or nearly every answer would be 1."""
    counts = split.objects.countable(image, most)
    chance = random.Random(f"{seed} {image}")
    number = chance.choice(sorted(set(counts.values())))
    name = chance.choice(sorted(name for name, count in counts.items() if count == number))
    row = {"task": "questions", "kind": "count", **_turns(f"How many {plural(name)} are in the image?", str(number))}
    yield _sample(split, image, f"count-{image:012d}", {**row, "object": name, "count": number}, size)


def _turns(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "text": f"<image>\n{question}"}, {"role": "assistant", "text": answer}]
    return {"conversations": turns}


def _sample(split: Split, image: int, key: str, row: dict[str, Any], size: int | None) -> dict[str, Any]:
    name = split.files.get(image)
    if name is None:
        raise BadSampleError(f"missing image: the list names no file of image {image}")
    kind, content = read_image(split.folder, name, size)
    return {"__key__": key, "json": {**row, "image_id": image, "file": name}, f"0.{kind}": content}


def plan(split: Split, arguments: argparse.Namespace) -> list[Part[int]]:
    """The parts of one split: which images, in an order that depends on the seed alone."""
    size, seed, objects = arguments.image_size, arguments.seed, split.objects
    kinds = sorted(objects.counts)
    chosen: dict[str, tuple[list[int], int, Callable[[int], Iterator[dict[str, Any]]]]] = {
        "captions": (sorted(split.captions), 0, lambda image: caption_samples(split, image, size, seed, arguments.all_captions)),
        "exists": (
            [image for image in kinds if len(objects.present(image)) > 3],
            arguments.exists_images,
            lambda image: exists_samples(split, image, size, seed, arguments.pairs),
        ),
        "count": (
            [image for image in kinds if objects.countable(image, arguments.most)],
            arguments.count_images,
            lambda image: count_samples(split, image, size, seed, arguments.most),
        ),
    }
    parts = []
    for task, (images, limit, make) in chosen.items():
        random.Random(f"{seed} {task}").shuffle(images)
        images = images[: limit or None]
        if images and task not in arguments.without:
            label = f"{split.name}/{task}/{{}}".format
            parts.append(Part(f"{split.name}/{task}", images, make, label, arguments.images_per_shard))
    return parts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="python -m data_pipelines.coco",
        description="COCO captions and instances to captions, POPE's yes/no questions and counting questions.",
        epilog="A stopped conversion goes on when it is started again. Images are copied byte for byte unless shrunk.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("source", type=Path, metavar="SRC", help="folder with annotations/ and the images' folders")
    made.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    made.add_argument("--images", type=Path, metavar="FOLDER", help="images in FOLDER/SPLIT or FOLDER (where None: in SRC)")
    made.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these, such as val2017 (where None: all)")
    made.add_argument("--without", nargs="+", choices=("captions", "exists", "count"), default=[], help="parts to leave out")
    made.add_argument("--all-captions", action="store_true", help="a sample for each caption instead of one per image")
    made.add_argument("--exists-images", type=int, default=500, metavar="N", help="images asked about existence; 0 takes all")
    made.add_argument("--pairs", type=int, default=3, metavar="N", help="present and absent objects per image and setting")
    made.add_argument("--count-images", type=int, default=500, metavar="N", help="images asked about numbers; 0 takes all")
    made.add_argument("--most", type=int, default=10, metavar="N", help="highest number asked for")
    made.add_argument("--seed", type=int, default=0, help="order, captions and objects chosen")
    add_options(made, "images")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert and report.

    Raises:
        ValueError: an argument outside its range, or annotations in another layout.
        FileNotFoundError: annotations or images are not there.
    """
    check_numbers(arguments)
    for option, value, least in (
        ("--pairs", arguments.pairs, 1),
        ("--most", arguments.most, 1),
        ("--exists-images", arguments.exists_images, 0),
        ("--count-images", arguments.count_images, 0),
    ):
        if value < least:
            raise ValueError(f"{option}: found {value}, expected whole numbers from {least} on")
    splits = find_splits(arguments.source, arguments.images, arguments.splits)
    parts = [part for split in splits for part in plan(split, arguments)]
    ignored = ("source", "out", "images", "overwrite", "retry")
    kept = {name: value for name, value in vars(arguments).items() if name not in ignored}
    print_report(arguments.out, convert(arguments.out, kept, parts, arguments.overwrite, arguments.retry))


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(parser().parse_args())))
