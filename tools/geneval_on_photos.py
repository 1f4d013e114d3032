"""Whether an evaluator of GenEval can be trusted: prompts made from COCO's annotations, put to their own photographs and to others.

    python tools/geneval_on_photos.py coco detector.onnx --out runs/geneval-photos

``coco`` is the usual folder (``annotations/instances_*.json`` and the folders of images), the detector an ONNX file for
``ONNXDetector``. Prompts are those of GenEval that need no colours: ``single_object``, ``two_object``, ``counting`` and
``position``, the last by the official rule on the true boxes. ``OUT/metadata.jsonl`` has them, with the file of each, in GenEval's
format; ``OUT/scores.json`` the scores of the true photographs and of mismatched ones, and what the detector missed or made up;
``OUT/verdicts.csv`` each verdict; ``OUT/wrong.png`` the true photographs that were refused.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipelines.converters.texts import with_article
from umm_zoo.batch import Batch, Images
from umm_zoo.benchmarks.base import Verdict
from umm_zoo.benchmarks.geneval.benchmark import GenEval
from umm_zoo.benchmarks.geneval.detector import Detector, coco_name
from umm_zoo.benchmarks.geneval.onnx_detector import ONNXDetector
from umm_zoo.callbacks.cards import Card, draw_cards
from umm_zoo.checkpoints.plain_files import strict_json
from umm_zoo.errors import UserError, say, user_errors
from umm_zoo.generation.images import open_image
from umm_zoo.generation.tensors import from_pil, to_pil
from umm_zoo.metrics.geneval_rule import Detections, GenEvalRule
from umm_zoo.outputs import Outputs

NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "bench": "benches", "bus": "buses", "sandwich": "sandwiches"}
#: Never counted: one is a pair, or nobody can say how many there are.
UNCOUNTED = {"scissors", "skis", "broccoli"}
#: Prompts of a kind that a photograph gives, so that a crowded one does not weigh more.
PER_KIND = 2
OVERLAP = 0.5


class Thing(NamedTuple):
    """An annotated object."""

    name: str
    box: np.ndarray
    share: float  #: of the area of the image
    crowd: bool


def annotated(folder: Path) -> dict[Path, list[Thing]]:
    """The objects of every photograph that is annotated and there."""
    found: dict[Path, list[Thing]] = {}
    for file in sorted((folder / "annotations").glob("instances_*.json")):
        stored = json.loads(file.read_text(encoding="utf-8"))
        names = {row["id"]: coco_name(row["name"]) or row["name"] for row in stored["categories"]}
        images = {row["id"]: row for row in stored["images"]}
        paths = {number: folder / file.stem.removeprefix("instances_") / row["file_name"] for number, row in images.items()}
        found |= {path: [] for path in paths.values() if path.is_file()}
        for row in stored["annotations"]:
            if (things := found.get(paths[row["image_id"]])) is not None:
                left, top, width, height = row["bbox"]
                area = images[row["image_id"]]["width"] * images[row["image_id"]]["height"]
                box = np.array([left, top, left + width, top + height], np.float32)
                things.append(Thing(names[row["category_id"]], box, width * height / area, bool(row["iscrowd"])))
    if not found:
        raise UserError(folder, "no annotated photographs", "annotations/instances_*.json and their folders of images")
    return found


def prompts_of(things: Sequence[Thing], least: float, chance: random.Random) -> list[dict[str, Any]]:
    """GenEval's rows that a photograph fulfils, over kinds of which every object takes up a share of ``least`` or more."""
    groups: dict[str, list[Thing]] = defaultdict(list)
    for thing in things:
        groups[thing.name].append(thing)
    clear = {name: own for name, own in groups.items() if all(one.share >= least and not one.crowd for one in own)}
    names = sorted(clear)
    kinds: dict[str, list[dict[str, Any]]] = {tag: [] for tag in ("single_object", "two_object", "counting", "position")}
    for name in names:
        kinds["single_object"].append({"include": [_clause(name)], "prompt": with_article(name)})
        if (count := len(clear[name])) in NUMBERS and name not in UNCOUNTED:
            several = f"{NUMBERS[count]} {PLURALS.get(name, name + 's')}"
            kinds["counting"].append({"include": [_clause(name, count)], "exclude": [_clause(name, count + 1)], "prompt": several})
    for first, second in itertools.permutations(names, 2):
        both = f"{with_article(first)} and {with_article(second)}"
        if first < second:
            kinds["two_object"].append({"include": [_clause(first), _clause(second)], "prompt": both})
        if len(clear[first]) == len(clear[second]) == 1:
            for relation in GenEvalRule().relations(clear[first][0].box, clear[second][0].box):
                placed = {**_clause(first), "position": [relation, 0]}
                text = f"{with_article(first)} {relation} {with_article(second)}"
                kinds["position"].append({"include": [_clause(second), placed], "prompt": text})
    chosen = [(tag, row) for tag, rows in kinds.items() for row in chance.sample(rows, min(PER_KIND, len(rows)))]
    return [{"tag": tag, **row, "prompt": f"a photo of {row['prompt']}"} for tag, row in chosen]


def _clause(name: str, count: int = 1) -> dict[str, Any]:
    return {"class": name, "count": count}


class Remembered(Detector):
    """A detector that looks at every photograph once, however many prompts it is put to."""

    def __init__(self, detector: Detector, photos: Sequence[Tensor]) -> None:
        super().__init__()
        self.detector = detector
        self.found = {id(photo): detector([photo])[0] for photo in photos}

    def forward(self, images: Images, least: float = 0.0) -> list[Detections]:
        """What was found before."""
        return [self.found[id(image)] for image in images]

    def detect(self, images: Tensor, least: float) -> list[Detections]:
        """Anew."""
        return self.detector.detect(images, least)

    def digest(self) -> str:
        """Of the detector."""
        return self.detector.digest()


def verdicts_of(benchmark: GenEval, rows: Sequence[dict[str, Any]], images: Sequence[Tensor]) -> list[Verdict]:
    """Of each row on its image."""
    batch = Batch([f"{number:05d}" for number in range(len(rows))], [[] for _ in rows], meta=[dict(row) for row in rows])
    found = dict(benchmark.verdicts(Outputs(generated=list(images)), batch))
    return [found[place] for place in range(len(rows))]


def scores_of(benchmark: GenEval, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """By name."""
    records = torch.tensor([list(verdict.record) for verdict in verdicts])
    return {name: round(float(value), 4) for name, value in benchmark.values_of(records).items()}


def share(right: Iterable[bool]) -> float:
    """Of the true ones."""
    values = list(right)
    return round(sum(values) / len(values), 4) if values else 0.0


def errors_of(truth: Sequence[Sequence[Thing]], seen: Sequence[Detections], least: float) -> dict[str, dict[str, int]]:
    """Objects by class: ``true`` ones of a share of ``least`` or more, ``missed`` among them, and ``false`` detections above .3."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for things, found in zip(truth, seen, strict=True):
        sure = [(name, box) for name, score, box in zip(found.names, found.scores, found.boxes, strict=True) if score > 0.3]
        for thing in things:
            if thing.share >= least and not thing.crowd:
                counts[thing.name]["true"] += 1
                counts[thing.name]["missed"] += not any(
                    name == thing.name and _iou(box, thing.box) >= OVERLAP for name, box in sure
                )
        for name, box in sure:
            beside = [thing for thing in things if thing.name == name]
            counts[name]["false"] += not any(_iou(box, thing.box) >= OVERLAP or thing.crowd for thing in beside)
    table = {name: {key: own[key] for key in ("true", "missed", "false")} for name, own in counts.items()}
    return dict(sorted(table.items(), key=lambda item: -item[1]["missed"] - item[1]["false"]))


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    shared = float(sides.clip(0).prod())
    return shared / float((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - shared)


def holds(things: Sequence[Thing], row: dict[str, Any]) -> bool:
    """Whether a photograph fulfils a prompt by its annotations alone."""
    boxes = np.array([thing.box for thing in things], np.float32).reshape(-1, 4)
    return GenEvalRule()(Detections([thing.name for thing in things], np.ones(len(things)), boxes), row, lambda name, own: ()).right


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("coco", type=Path, help="folder of COCO")
    parser.add_argument("detector", type=Path, help="ONNX file of a detector")
    parser.add_argument("--out", type=Path, default=Path("geneval-photos"), help="folder of the results")
    parser.add_argument("--least", type=float, default=0.01, help="share of the image that each object of a prompt takes up (.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    arguments = parser.parse_args(argv)
    with user_errors() as outcome:
        evaluate(arguments.coco, arguments.detector, arguments.out, arguments.least, arguments.seed)
    return outcome.code


def evaluate(coco: Path, detector: Path, out: Path, least: float, seed: int) -> None:
    """Make the prompts, score both, and write what was found."""
    truth, chance = annotated(coco), random.Random(seed)
    pairs = [(path, row) for path, things in truth.items() for row in prompts_of(things, least, chance)]
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**row, "file": str(path.relative_to(coco))}) + "\n" for path, row in pairs]
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = [row for _, row in pairs]
    others = dealt([path for path, _ in pairs], rows)
    photos = {path: from_pil(open_image(path)) for path in truth}
    began = time.monotonic()
    benchmark = GenEval(out / "metadata.jsonl", Remembered(ONNXDetector(detector), list(photos.values())))
    seconds = time.monotonic() - began
    mine = verdicts_of(benchmark, rows, [photos[path] for path, _ in pairs])
    theirs = verdicts_of(benchmark, rows, [photos[path] for path in others])
    patient = GenEval(benchmark.prompts, benchmark.detector, rule=GenEvalRule(counting_threshold=benchmark.rule.threshold))
    counted = [place for place, row in enumerate(rows) if row["tag"] == "counting"]
    scores: dict[str, Any] = {
        "prompts": len(rows),
        "photographs": len({path for path, _ in pairs}),
        "prompts by kind": Counter(row["tag"] for row in rows),
        "true": scores_of(benchmark, mine),
        "mismatched": scores_of(benchmark, theirs),
        "mismatched, by the annotations": share(holds(truth[path], row) for path, row in zip(others, rows, strict=True)),
        "seconds per image": round(seconds / len(photos), 3),
        "detector": benchmark.detector.digest(),
    }
    for name, paths in (("true", [path for path, _ in pairs]), ("mismatched", others)):  # surer than most detectors are
        again = verdicts_of(patient, [rows[place] for place in counted], [photos[paths[place]] for place in counted])
        scores[f"{name}, counting above {patient.rule.counting_threshold}"] = share(verdict.score > 0 for verdict in again)
    scores["errors"] = errors_of(list(truth.values()), benchmark.detector(list(photos.values())), least)
    totals = {key: sum(own[key] for own in scores["errors"].values()) for key in ("true", "missed", "false")}
    scores["errors"] = {"all": totals, **scores["errors"]}
    (out / "scores.json").write_text(strict_json(scores, indent=2) + "\n", encoding="utf-8")
    with (out / "verdicts.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["photographs", "file", "prompt", "tag", "right", "reason", "detected"])
        for name, paths, verdicts in (("true", [path for path, _ in pairs], mine), ("mismatched", others, theirs)):
            for path, row, verdict in zip(paths, rows, verdicts, strict=True):
                writer.writerow(
                    [name, path.name, row["prompt"], row["tag"], int(verdict.score), verdict.reason, verdict.columns["detected"]]
                )
    wrong = [
        Card(row["tag"], row["prompt"], verdict.reason.replace("\n", "; "), "", False, {path.stem: to_pil(photos[path])})
        for (path, row), verdict in zip(pairs, mine, strict=True)
        if not verdict.score
    ]
    if wrong:
        draw_cards(random.Random(seed).sample(wrong, min(24, len(wrong))), 256, 4).save(out / "wrong.png")
    for name, value in scores.items():
        say(f"{name}: {value['all'] if name == 'errors' else value}")
    say(f"written to {out}")


def dealt(paths: Sequence[Path], rows: Sequence[dict[str, Any]]) -> list[Path]:
    """For each prompt the photograph of another one of its kind, half the kind further on."""
    others = list(paths)
    for tag in {row["tag"] for row in rows}:
        own = [place for place, row in enumerate(rows) if row["tag"] == tag]
        for number, place in enumerate(own):
            others[place] = paths[own[(number + len(own) // 2) % len(own)]]
    return others


if __name__ == "__main__":
    sys.exit(main())
