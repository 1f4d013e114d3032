"""``python -m data_pipelines.coco SRC OUT``: converter of COCO's captions, and of its objects to questions.

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
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.command import Parser, run, whole
from data_pipelines.converters.converting import Part, convert, converter_parser
from data_pipelines.converters.files import image_members
from data_pipelines.converters.rows import read_json
from data_pipelines.converters.texts import with_article, without_markers
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import INSTRUCTION, question_and_answer
from umm_zoo.errors import UserError

_PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep"}
_PLURALS |= {"scissors": "pairs of scissors", "skis": "pairs of skis", "broccoli": "pieces of broccoli"}


@dataclass
class Objects:
    """Objects of one split: single ones per image and name, names per image of which a crowd is marked, and every name."""

    counts: dict[int, Counter[str]]
    crowds: dict[int, set[str]]
    names: set[str]
    _frequency: Counter[str] = field(default_factory=Counter, repr=False)
    _together: dict[str, Counter[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_instances(cls, content: dict[str, Any]) -> Objects:
        """Count the annotations of an instances file."""
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        made = cls({}, {}, set(names.values()))
        for row in content["annotations"]:
            image, name = row["image_id"], names[row["category_id"]]
            counts = made.counts.setdefault(image, Counter())
            if row.get("iscrowd"):
                made.crowds.setdefault(image, set()).add(name)
            else:
                counts[name] += 1
        for image in made.counts:
            present = made.present(image)
            made._frequency.update(present)
            for name in present:
                made._together.setdefault(name, Counter()).update(present - {name})
        return made

    def present(self, image: int) -> set[str]:
        """Names of what is in an image, alone or in a crowd."""
        return set(self.counts[image]) | self.crowds.get(image, set())

    def absent(self, image: int) -> list[str]:
        """Names of what is not in an image, sorted."""
        return sorted(self.names - self.present(image))

    def popular(self, image: int) -> list[str]:
        """Objects that are not in an image, most frequent in the split first."""
        return sorted(self.absent(image), key=lambda name: (-self._frequency[name], name))

    def adversarial(self, image: int) -> list[str]:
        """Objects that are not in an image, most often together with what is there first."""
        score: Counter[str] = Counter()
        for name in self.present(image):
            score.update(self._together[name])
        return sorted(self.absent(image), key=lambda name: (-score[name], name))

    def countable(self, image: int, most: int) -> Counter[str]:
        """Numbers from 1 to ``most`` of objects of which no crowd is marked."""
        crowds = self.crowds.get(image, set())
        return Counter({name: count for name, count in self.counts[image].items() if name not in crowds and count <= most})


@dataclass(frozen=True)
class Split:
    """Split of the data: its images' folder, their file names by id, captions by id, and its objects."""

    name: str
    folder: Path
    files: dict[int, str]
    captions: dict[int, list[str]]
    objects: Objects


def find_splits(source: Path, images: Path | None, wanted: list[str] | None) -> list[Split]:
    """The splits that are there, with their annotations."""
    if not source.is_dir():
        raise UserError(source, "no such folder")
    folder = source / "annotations" if (source / "annotations").is_dir() else source
    files = {path.stem: path for kind in ("captions", "instances") for path in sorted(folder.glob(f"{kind}_*.json"))}
    names = sorted({stem.split("_", 1)[1] for stem in files})
    if not names:
        raise UserError(folder, "neither captions_*.json nor instances_*.json", "one of them")
    for name in wanted or []:
        if name not in names:
            raise UserError("--splits", f"'{name}'", ", ".join(names))
    return [_read_split(source, images, name, files) for name in wanted or names]


def _read_split(source: Path, images: Path | None, name: str, files: dict[str, Path]) -> Split:
    base = images or source
    places = [base / name, base / "images" / name, *([base] if images else [])]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise UserError(places[0], f"no such folder of images (nor {places[1]})", hint="--images names another one")
    named: dict[int, str] = {}
    captions: dict[int, list[str]] = {}
    objects = Objects({}, {}, set())
    if path := files.get(f"captions_{name}"):
        with _annotations(path, "images", "annotations") as content:
            named |= {image["id"]: image["file_name"] for image in content["images"]}
            for row in content["annotations"]:
                if caption := without_markers(str(row["caption"])):
                    captions.setdefault(row["image_id"], []).append(caption)
    if path := files.get(f"instances_{name}"):
        with _annotations(path, "images", "annotations", "categories") as content:
            named |= {image["id"]: image["file_name"] for image in content["images"]}
            objects = Objects.from_instances(content)
    return Split(name, folder, named, captions, objects)


@contextmanager
def _annotations(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """The content of a file in COCO's layout; what it lacks is named."""
    content = read_json(path)
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise UserError(path, f"not COCO's layout, the list '{missing[0]}' is missing")
    try:
        yield content
    except (KeyError, TypeError) as error:
        raise UserError(path, f"not COCO's layout ({type(error).__name__}: {error})") from error


def caption_samples(split: Split, image: int, size: int | None, seed: int, every: bool) -> Iterator[dict[str, Any]]:
    """The image with one of its captions (all of them in ``captions``), or with each."""
    captions = split.captions[image]
    chosen = captions if every else [random.Random(f"{seed} {image}").choice(captions)]
    for place, caption in enumerate(chosen):
        turns = question_and_answer(INSTRUCTION, caption)
        row = {"task": "caption", "kind": "caption", "conversations": turns, "captions": captions}
        yield _sample(split, image, f"captions-{image:012d}-{place}", row, size)


def exists_samples(split: Split, image: int, size: int | None, seed: int, pairs: int) -> Iterator[dict[str, Any]]:
    """For each of POPE's settings ``pairs`` questions about present objects and as many about absent ones."""
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
    for setting, others in negatives.items():
        asked = [question for pair in zip(positives, others, strict=True) for question in pair]
        for place, name in enumerate(asked):
            answer = ("yes", "no")[place % 2]
            turns = question_and_answer(f"Is there {article(name)} in the image?", answer)
            row = {"task": "questions", "kind": "exists", "conversations": turns, "negative": setting, "object": name}
            yield _sample(split, image, f"exists-{image:012d}-{setting}-{place}", row, size)


def article(name: str) -> str:
    """``a dog``, ``an apple``, ``a pair of skis``."""
    return f"a pair of {name}" if name in ("scissors", "skis") else with_article(name)


def plural(name: str) -> str:
    """``dogs``, ``wine glasses``, ``people``."""
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in tuple("aeiou"):
        return f"{name[:-1]}ies"
    return f"{name}s"


def count_samples(split: Split, image: int, size: int | None, seed: int, most: int) -> Iterator[dict[str, Any]]:
    """ "How many dogs are in the image?": a number is chosen first, then the object, or nearly every answer would be 1."""
    counts = split.objects.countable(image, most)
    chance = random.Random(f"{seed} {image}")
    number = chance.choice(sorted(set(counts.values())))
    name = chance.choice(sorted(name for name, count in counts.items() if count == number))
    turns = question_and_answer(f"How many {plural(name)} are in the image?", str(number))
    row = {"task": "questions", "kind": "count", "conversations": turns, "object": name, "count": number}
    yield _sample(split, image, f"count-{image:012d}", row, size)


def _sample(split: Split, image: int, key: str, row: dict[str, Any], size: int | None) -> dict[str, Any]:
    name = split.files.get(image)
    if name is None:
        raise BadSampleError(f"missing image: the list names no file of image {image}")
    return {"__key__": key, "json": {**row, "image_id": image, "file": name}, **image_members([name], None, split.folder, size)}


def plan(split: Split, arguments: argparse.Namespace) -> list[Part[int]]:
    """The parts of one split: which images, in an order that depends on the seed alone."""
    size, seed, objects = arguments.image_size, arguments.seed, split.objects
    several = [image for image in sorted(objects.counts) if len(objects.present(image)) > 3]
    countable = [image for image in sorted(objects.counts) if objects.countable(image, arguments.most)]
    chosen: dict[str, tuple[list[int], int, Callable[[int], Iterator[dict[str, Any]]]]] = {
        "captions": (sorted(split.captions), 0, lambda image: caption_samples(split, image, size, seed, arguments.all_captions)),
        "exists": (several, arguments.exists_images, lambda image: exists_samples(split, image, size, seed, arguments.pairs)),
        "count": (countable, arguments.count_images, lambda image: count_samples(split, image, size, seed, arguments.most)),
    }
    parts = []
    for task, (images, limit, make) in chosen.items():
        random.Random(f"{seed} {task}").shuffle(images)
        images = images[: limit or None]
        if images and task not in arguments.without:
            name = f"{split.name}/{task}"
            parts.append(Part(name, images, make, f"{name}/{{}}".format, arguments.images_per_shard))
    return parts


def parser() -> Parser:
    """The command line."""
    made = converter_parser(__doc__, "folder with annotations/ and the images' folders", unit="images")
    made.add_argument("--images", type=Path, metavar="FOLDER", help="images in FOLDER/SPLIT or FOLDER (where None: in SRC)")
    made.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these, such as val2017 (where None: all)")
    made.add_argument("--without", nargs="+", choices=("captions", "exists", "count"), default=[], help="parts to leave out")
    made.add_argument("--all-captions", action="store_true", help="a sample for each caption instead of one per image")
    for name, least, default, what in (
        ("exists-images", 0, 500, "images asked about existence; 0 takes all"),
        ("pairs", 1, 3, "present and absent objects per image and setting"),
        ("count-images", 0, 500, "images asked about numbers; 0 takes all"),
        ("most", 1, 10, "highest number asked for"),
    ):
        made.add_argument(f"--{name}", type=whole(least), default=default, metavar="N", help=what)
    made.add_argument("--seed", type=int, default=0, help="order, captions and objects chosen")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Convert and report."""
    splits = find_splits(arguments.source, arguments.images, arguments.splits)
    convert(arguments, [part for split in splits for part in plan(split, arguments)])


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
