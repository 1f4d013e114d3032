"""Draw what the shipped parts do to scenes they have never seen: images for the README.

    python tools/show_parts.py codec --photos FOLDER         codec.png and codec-photos.png: original, round trip, difference
    python tools/show_parts.py llava vlm                     llava.png, vlm.png: captions and answers, right or wrong
    python tools/show_parts.py                               all parts that have something to show

A part is a folder of experiments/tiny/weights. Its scenes are rendered from a seed it was not trained on, in the world its card
names. FOLDER holds photos (any depth), or is a path of tar shards; they are shrunk to the codec's size.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools.probing import load_part
from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.batch import Batch, stacked
from umm_zoo.callbacks.cards import Card, draw_cards
from umm_zoo.callbacks.samples import card_of
from umm_zoo.errors import REFUSALS, locating, user_errors
from umm_zoo.generation.tensors import to_pil
from umm_zoo.outputs import Outputs
from umm_zoo.shapes import World, make_sample, render

WEIGHTS = Path("experiments/tiny/weights")
SEED = 99  # the parts were trained on seeds 1 and 2
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def world_of(card: dict[str, Any]) -> World:
    """The world a part was trained on, the usual one where its card names none."""
    found = card["worlds"][0]["world"] if card.get("worlds") else {}
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return World(**fields)


def held_out(world: World, task: str, indices: Sequence[int], mark_share: float = 0.2) -> Batch:
    """Samples of the test split of a seed that no part was trained on."""
    samples = [make_sample(world, SEED, "test", task, index, mark_share) for index in indices]
    images = np.stack([render(world, scene) for sample in samples for scene in sample.scenes])
    return Batch(
        keys=[sample.key for sample in samples],
        conversations=[sample.row["conversations"] for sample in samples],
        images=list(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1),
        image_counts=[len(sample.scenes) for sample in samples],
        meta=[sample.row for sample in samples],
    )


def one_of_each_kind(world: World, task: str, count: int, mark_share: float) -> Batch:
    """``count`` samples of a task, the kinds in turn."""
    kinds: dict[str, list[int]] = {}
    for index in range(20 * count):
        kinds.setdefault(make_sample(world, SEED, "test", task, index, mark_share).row["kind"], []).append(index)
    turns = [kinds[kind][turn] for turn in range(count) for kind in sorted(kinds) if turn < len(kinds[kind])]
    return held_out(world, task, turns[:count], mark_share)


@torch.no_grad()
def round_trips(codec: LatentCodec, images: Tensor, names: list[str]) -> list[Card]:
    """Original, round trip and four times their difference (grey is none), with the image's own PSNR."""
    drawn = codec.decode(codec.encode(images)).clamp(-1, 1)
    cards = []
    for name, original, found in zip(names, images, drawn, strict=True):
        decibels = 10 * math.log10(4 / max((found - original).square().mean().item(), 1e-9))
        shown = {"original": original, "round trip": found, "difference x 4": 2 * (found - original)}
        drawings = {label: to_pil(image) for label, image in shown.items()}
        cards.append(Card(f"{name}, {decibels:.1f} dB", "", None, "", None, drawings))
    return cards


@torch.no_grad()
def answered(vlm: VLMBackbone, batch: Batch, max_new_tokens: int) -> list[Card]:
    """Answers of the model to each row, with the truth."""
    answers = vlm.generate(batch.prompts(), batch.images, batch.image_counts, max_new_tokens)
    outputs = Outputs(answers=answers)
    return [card_of(row, outputs, batch, title=batch.meta[row]["kind"].replace("_", " ")) for row in range(len(batch))]


def photos(source: str, size: int, count: int) -> tuple[Tensor, list[str]]:
    """``count`` photos spread over a folder or over shards, ``[count, 3, size, size]``, and their names.

    Raises:
        FileNotFoundError: there is none.
    """
    from umm_zoo.generation.model import load_image

    if source.endswith(".tar"):
        from data_pipelines.shards.data import ShardData, ShardSource

        data = ShardData(val={"photos": ShardSource(source)}, image_size=size, val_batch_size=64)
        data.prepare_data()
        data.setup("validate")
        found = [(image, "photo") for batch in data.val_dataloader() for image in batch.images]
        if not found:
            raise FileNotFoundError(f"{source}: found no images, expected shards of samples with an input image")
    else:
        paths = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in IMAGES)
        if not paths:
            raise FileNotFoundError(f"{source}: found no images, expected a folder of {', '.join(IMAGES)} or tar shards")
        chosen = paths[:: max(1, len(paths) // count)]
        found = [(load_image(path, size), path.parent.name) for path in chosen[:count]]
    found = found[:: max(1, len(found) // count)][:count]
    return torch.stack([image for image, _ in found]), [name for _, name in found]


def show(name: str, weights: Path, out: Path, photo_source: str | None, side: int) -> list[Path]:
    """Draw one part; returns the files written, none where a part has no image of its own."""
    part: Any = load_part(str(weights / name))
    file = weights / name / "card.json"
    card = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    world, sheets = world_of(card), {}
    if isinstance(part, LatentCodec):
        scenes = stacked(held_out(world, "captions", range(8)).images)
        sheets[name] = (round_trips(part, scenes, ["held-out scene"] * 8), 96, 4)
        if photo_source:
            sheets[f"{name}-photos"] = (round_trips(part, *photos(photo_source, world.image_size, 8)), 96, 4)
    elif isinstance(part, VLMBackbone):
        scores = {key.rsplit("/", 1)[-1] for split in card["scores"].values() for key in split["metrics"]} if card else set()
        cards = answered(part, held_out(world, "captions", [1, 2, 3, 4]), 64)
        cards += answered(part, one_of_each_kind(world, "questions", 8, 0.2 if "mark" in scores else 0.0), 10)
        if "two_same" in scores:
            cards += answered(part, one_of_each_kind(world, "two_images", 4, 0.0), 24)
        sheets[name] = (cards, side, 4)
    written = []
    for title, (cards, size, per_row) in sheets.items():
        path = out / f"{title}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_cards(cards, size, per_row).quantize(256).save(path, optimize=True)
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="folders of the weights (default: all)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help=f"where they are (default {WEIGHTS})")
    parser.add_argument("--out", type=Path, default=Path("experiments/tiny/results"), help="folder of the images")
    parser.add_argument("--photos", metavar="FOLDER", help="photos for the codec: a folder of images, or tar shards")
    parser.add_argument("--side", type=int, default=128, help="pixels a side of a scene beside its answer (default 128)")
    arguments = parser.parse_args(argv)
    names = arguments.parts or sorted(folder.name for folder in arguments.weights.iterdir() if folder.is_dir())
    with user_errors() as outcome, locating(refusals=REFUSALS):
        for name in names:
            if not (arguments.weights / name).is_dir():
                raise FileNotFoundError(f"{arguments.weights / name}: no such part")
            for path in show(name, arguments.weights, arguments.out, arguments.photos, arguments.side):
                print(f"{path}: {path.stat().st_size / 1024:.0f} kB")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
