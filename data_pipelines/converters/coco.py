"""``python -m data_pipelines.coco SRC OUT``: converter of COCO's captions, and of its objects to questions.

``SRC`` is the usual folder, with any of its files (``2014`` and lists of one's own in the same layout are understood as well)::

    SRC/annotations/captions_train2017.json   SRC/annotations/instances_val2017.json   SRC/train2017/*.jpg   SRC/val2017/*.jpg
    SRC/annotations/lvis_v1_val.json

    python -m data_pipelines.coco coco shards/coco
    python -m data_pipelines.coco coco shards/coco-small --splits val2017 --image-size 336 --exists-images 0 --count-images 1000

gives per split ``OUT/val2017/captions-*.tar``, ``exists-*.tar`` and ``count-*.tar``. The yes/no questions are POPE's (Li et al.,
2023, arXiv 2305.10355): images with more than three kinds of objects; for each of the settings random, popular and adversarial
as many questions about present objects as about absent ones, the absent ones drawn at random, the most frequent of the split, or
those seen most often together with what is there. Every question is a sample with its own copy of the image, hence the limits.
``OUT/val2017/pope_random.jsonl`` and so on are the same questions as POPE publishes its own, for a finished run::

    python -m umm_zoo.evaluate RUN --benchmark pope questions=shards/coco/val2017 images=coco/val2017
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipelines.command import Parser, run, whole
from data_pipelines.converters.coco_lists import Id, Objects, Split, find_splits, in_order
from data_pipelines.converters.converting import Part, convert, converter_parser
from data_pipelines.converters.files import image_members
from data_pipelines.converters.texts import with_article
from data_pipelines.decoding import BadSampleError
from data_pipelines.tasks import INSTRUCTION, question_and_answer
from umm_zoo.checkpoints.plain_files import write_whole

_PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep"}
_ANSWERS = ("yes", "no")
_PLURALS |= {"scissors": "pairs of scissors", "skis": "pairs of skis", "broccoli": "pieces of broccoli"}


def caption_samples(
    split: Split, captions: list[str], image: Id, size: int | None, seed: int, every: bool
) -> Iterator[dict[str, Any]]:
    """The image with one of its captions (all of them in ``captions``), or with each."""
    chosen = captions if every else [random.Random(f"{seed} {image}").choice(captions)]
    for place, caption in enumerate(chosen):
        turns = question_and_answer(INSTRUCTION, caption)
        row = {"task": "caption", "kind": "caption", "conversations": turns, "captions": captions}
        yield _sample(split, image, f"captions-{_key(image)}-{place}", row, size)


def exists_questions(objects: Objects, image: Id, seed: int, pairs: int) -> Iterator[tuple[str, int, str]]:
    """(setting, place, object) of an image's questions; those at even places are about what is there."""
    chance = random.Random(f"{seed} {image}")
    present = sorted(objects.present(image))
    positives = chance.sample(present, min(pairs, len(present)))
    absent = objects.absent(image)
    if len(absent) < len(positives):
        raise BadSampleError("too few absent objects: nearly every object is in the image, or was not looked for")
    negatives = {
        "random": chance.sample(absent, len(positives)),
        "popular": objects.popular(image)[: len(positives)],
        "adversarial": objects.adversarial(image)[: len(positives)],
    }
    for setting, others in negatives.items():
        asked = [question for pair in zip(positives, others, strict=True) for question in pair]
        yield from ((setting, place, name) for place, name in enumerate(asked))


def exists_samples(split: Split, objects: Objects, image: Id, size: int | None, seed: int, pairs: int) -> Iterator[dict[str, Any]]:
    """For each of POPE's settings ``pairs`` questions about present objects and as many about absent ones."""
    for setting, place, name in exists_questions(objects, image, seed, pairs):
        turns = question_and_answer(_exists(name), _ANSWERS[place % 2])
        row = {"task": "questions", "kind": "exists", "conversations": turns, "negative": setting, "object": name}
        yield _sample(split, image, f"exists-{_key(image)}-{setting}-{place}", row, size)


def pope_files(split: Split, objects: Objects, images: list[Id], seed: int, pairs: int) -> dict[str, str]:
    """The same questions as the files that POPE publishes, by setting; images that are not there are left out."""
    lines: dict[str, list[str]] = {}
    for image in images:
        with suppress(BadSampleError):
            folder, file = split.find(image)
            if not (folder / file).is_file():
                continue
            for setting, place, name in exists_questions(objects, image, seed, pairs):
                own = lines.setdefault(setting, [])
                row = {"question_id": len(own) + 1, "image": file, "text": _exists(name), "label": _ANSWERS[place % 2]}
                own.append(json.dumps(row, ensure_ascii=False) + "\n")
    return {setting: "".join(own) for setting, own in lines.items()}


def _exists(name: str) -> str:
    return f"Is there {article(name)} in the image?"


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


def count_samples(split: Split, objects: Objects, image: Id, size: int | None, seed: int, most: int) -> Iterator[dict[str, Any]]:
    """ "How many dogs are in the image?": a number is chosen first, then the object, or nearly every answer would be 1."""
    counts = objects.countable(image, most)
    chance = random.Random(f"{seed} {image}")
    number = chance.choice(sorted(set(counts.values())))
    name = chance.choice(sorted(name for name, count in counts.items() if count == number))
    turns = question_and_answer(f"How many {plural(name)} are in the image?", str(number))
    row = {"task": "questions", "kind": "count", "conversations": turns, "object": name, "count": number}
    yield _sample(split, image, f"count-{_key(image)}", row, size)


def _sample(split: Split, image: Id, key: str, row: dict[str, Any], size: int | None) -> dict[str, Any]:
    folder, name = split.find(image)
    return {"__key__": key, "json": {**row, "image_id": image, "file": name}, **image_members([name], None, folder, size)}


def _key(image: Id) -> str:
    """An id as part of a key, which may hold no dot."""
    if isinstance(image, int):
        return f"{image:012d}"
    return f"{zlib.crc32(image.encode(errors='backslashreplace')):08x}-" + "".join(c if c.isalnum() else "_" for c in image)[:64]


def plan(split: Split, arguments: argparse.Namespace) -> list[Part[Id]]:
    """The parts of one split: which images, in an order that depends on the seed alone."""
    size, seed = arguments.image_size, arguments.seed
    chosen: dict[str, tuple[list[Id], int, Callable[[Id], Iterator[dict[str, Any]]]]] = {}
    not_chosen: dict[str, Counter[str]] = {}
    if (captions := split.captions) is not None:
        make = lambda image: caption_samples(split, captions[image], image, size, seed, arguments.all_captions)  # noqa: E731
        chosen["captions"] = (list(captions), 0, make)
        not_chosen["captions"] = Counter({"no caption": len(split.files.keys() - captions)})
    if (objects := split.objects) is not None:
        known = objects.counts.keys() - objects.incomplete
        several = [image for image in known if len(objects.present(image)) > 3]
        countable = [image for image in known if objects.countable(image, arguments.most)]
        make = lambda image: exists_samples(split, objects, image, size, seed, arguments.pairs)  # noqa: E731
        chosen["exists"] = (several, arguments.exists_images, make)
        make = lambda image: count_samples(split, objects, image, size, seed, arguments.most)  # noqa: E731
        chosen["count"] = (countable, arguments.count_images, make)
        for task, images, reason in (
            ("exists", several, "at most three kinds of objects"),
            ("count", countable, "nothing to count"),
        ):
            damaged = {"an annotation that cannot be used": len(objects.incomplete)}
            not_chosen[task] = Counter({reason: len(known) - len(images), **damaged})
    parts = []
    for task, (images, limit, make) in chosen.items():
        images.sort(key=in_order)
        random.Random(f"{seed} {task}").shuffle(images)
        not_chosen[task][f"not chosen (--{task}-images)"] = len(images) - len(images[: limit or None])
        if task not in arguments.without:
            name = f"{split.name}/{task}"
            label, rows = f"{name}/{{}}".format, arguments.images_per_shard
            parts.append(Part(name, images[: limit or None], make, label, rows, not_chosen=+not_chosen[task]))
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
    refused = {label: reason for split in splits for label, reason in split.refused.items()}
    plans = [(split, plan(split, arguments)) for split in splits]
    convert(arguments, [part for _, parts in plans for part in parts], refused)
    for split, parts in plans:
        exists = next((part for part in parts if part.name == f"{split.name}/exists"), None)
        if exists is not None and split.objects is not None and arguments.part.number == 1:
            files = pope_files(split, split.objects, list(exists.items), arguments.seed, arguments.pairs)
            for setting, lines in files.items():
                write_whole(arguments.out / split.name / f"pope_{setting}.jsonl", lines)


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
