"""What does a part carry? Linear and small-MLP probes of its features for any attribute of the ground truth.

    python tools/probe.py runs/tiny/tower --shards 'data/tiny/test/captions-*.tar' --attribute mark --layer -2
    python tools/probe.py experiments/tiny/tower.yaml --shards … --attribute colour        (untrained weights: the floor)
    python tools/probe.py experiments/tiny/weights/tower --shards … --attribute mark       (a folder that export_part.py wrote)
    python tools/probe.py 'umm_zoo.backbones.features.CLIPVisionFeatures:FOLDER' --shards … --attribute mark
    python tools/probe.py experiments/tiny/weights/llava --shards … --attribute mark       (what its language model gives out)
    python tools/probe.py pixels --shards … --attribute mark                               (the ceiling)

An attribute of objects (colour, shape, size, mark …) is asked of every cell that holds one, from the features of that cell; an
attribute of the scene (background, stripes) of each image, from one vector. Of a vision-language model the states at the image
tokens are read: what enters its language model (layer 0) or leaves it (layer -1); the question stands behind the image and cannot
reach them. The probe learns on three quarters of the images and is scored on the rest; the best of a few weight decays is chosen
on a slice of the former. Printed beside it: chance (the commonest value of the scored rows) and the number of scored rows, from
which the standard error follows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools.probing import Layer, probe
from umm_zoo.batch import Batch
from umm_zoo.errors import REFUSALS, locating, user_errors


def find_part(method: Any, source: str | Path, names: Sequence[str] = ("encoder", "tower", "codec", "vlm")) -> tuple[str, Any]:
    """The part of a run that others use, and its name.

    Raises:
        ValueError: it has none of these names.
    """
    for name in names:
        if isinstance(part := getattr(method, name, None), nn.Module):
            return name, part
    raise ValueError(f"{source}: {type(method).__name__} has parts {sorted(method.parts())}, expected one of {', '.join(names)}")


def load_part(source: str) -> nn.Module | None:
    """A part from an exported folder, a run folder, a checkpoint, an experiment file (untrained), ``CLASS:FOLDER``, or ``pixels``.

    Raises:
        ValueError: the method has no encoder, tower, codec or vlm.
    """
    from umm_zoo.experiment.build import build
    from umm_zoo.experiment.file import load_experiment
    from umm_zoo.method import Method

    part: nn.Module
    if source == "pixels":
        return None
    if (card := Path(source) / "card.json").is_file():
        part = build({**json.loads(card.read_text(encoding="utf-8"))["load"], "source": source})
    elif ":" in source:
        target, folder = source.split(":", 1)
        part = build({"_target_": f"{target}.from_pretrained", "source": folder})
    elif source.endswith((".yaml", ".yml")):
        experiment = load_experiment(source)
        torch.manual_seed(experiment.seed)
        part = find_part(build(experiment.method), source)[1]
    else:
        part = find_part(Method.load(source), source)[1]
    return part.eval()


def load_batches(shards: str, image_size: int, limit: int) -> tuple[list[Batch], list[str]]:
    """Labelled images of shards in their own order, and the names of the cells of their world (read from ``world.json``)."""
    from data_pipelines.shards.addresses import expand
    from data_pipelines.shards.data import ShardData, ShardSource
    from umm_zoo.shapes.scenes import PLACES

    data = ShardData(val={"probe": ShardSource(shards)}, image_size=image_size, val_batch_size=256)
    data.prepare_data()
    batches: list[Batch] = []
    for batch in data.val_dataloader():
        batches.append(batch)
        if sum(map(len, batches)) >= limit:
            break
    world = Path(expand(shards)[0]).parent.parent / "world.json"
    cells = json.loads(world.read_text(encoding="utf-8"))["world"]["cells"] if world.is_file() else 2
    return batches, list(PLACES[cells])


def parse_layer(text: str) -> Layer:
    """``pooled`` or a number."""
    return "pooled" if text == "pooled" else int(text)


def main() -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", help="exported folder, run folder, checkpoint, experiment file, CLASS:FOLDER, or 'pixels'")
    parser.add_argument("--shards", required=True, help="tar shards with 'scene' in their json")
    parser.add_argument("--attribute", required=True, nargs="+", help="colour, shape, size, mark, background …")
    parser.add_argument(
        "--layer",
        type=parse_layer,
        default=-1,
        help="of an encoder: -1 what it gives out, -2 what LLaVA reads, pooled its one vector; of a vision-language model: 0 what "
        "enters its language model, -1 what leaves it (default -1)",
    )
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side (default 32)")
    parser.add_argument("--limit", type=int, default=4000, help="at most about this many images (default 4000)")
    parser.add_argument("--steps", type=int, default=400, help="updates of each probe (default 400)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per attribute")
    arguments = parser.parse_args()
    with user_errors() as outcome, locating(refusals=REFUSALS):
        part = load_part(arguments.part)
        batches, cells = load_batches(arguments.shards, arguments.image_size, arguments.limit)
        for attribute in arguments.attribute:
            result = probe(part, batches, attribute, arguments.layer, cells, steps=arguments.steps)
            print(json.dumps(asdict(result)) if arguments.json else result, flush=True)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
