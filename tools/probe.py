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
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.codecs import LatentCodec
from umm_zoo.backbones.features import FeatureEncoder
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, image_of_each_row

#: Of an encoder: counted from its end, or ``pooled`` for its one vector. Of a vision-language model: 0 or -1.
Layer = int | Literal["pooled"]

#: Tokens ``[B, N, D]`` and their grid.
Features = tuple[Tensor, tuple[int, int]]

WEIGHT_DECAYS = (0.0, 0.01, 0.1)


@dataclass(frozen=True)
class ProbeResult:
    """How well an attribute can be read from features.

    Args:
        attribute: what was asked.
        linear: accuracy of a linear layer on held-out images.
        mlp: accuracy of two layers.
        chance: accuracy of always saying the commonest value.
        num_train: rows the probes learnt from.
        num_test: rows they are scored on.
    """

    attribute: str
    linear: float
    mlp: float
    chance: float
    num_train: int
    num_test: int

    def __str__(self) -> str:
        error = 100 * math.sqrt(max(self.mlp * (1 - self.mlp), 1e-9) / self.num_test)
        return (
            f"{self.attribute}: linear {100 * self.linear:.1f}%, MLP {100 * self.mlp:.1f}% (standard error {error:.1f}), "
            f"chance {100 * self.chance:.1f}%, n = {self.num_test} (trained on {self.num_train})"
        )


def cell_features(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The features of each cell of a square board, its tokens side by side where they divide evenly, else their average.

    Shape:
        - tokens: ``[B, N, D]`` in raster order, N = h * w
        - output: ``[B, side * side, F]``
    """
    B, _, D = tokens.shape
    h, w = grid
    board = tokens.transpose(1, 2).reshape(B, D, h, w)
    if h % side or w % side:
        return F.adaptive_avg_pool2d(board, side).flatten(2).transpose(1, 2)
    board = board.reshape(B, D, side, h // side, side, w // side).permute(0, 2, 4, 1, 3, 5)
    return board.reshape(B, side * side, -1)


def labelled_rows(
    batch: Batch, features: Tensor, grid: tuple[int, int], attribute: str, cells: list[str]
) -> tuple[Tensor, list[str], list[int]]:
    """Features, values and image numbers of all rows of a batch that have the attribute.

    Args:
        batch: rows with a scene.
        features: ``[B, N, D]`` patch tokens.
        grid: of the tokens.
        attribute: of the scene's objects, or of the scene.
        cells: names of the cells in reading order.

    Raises:
        ValueError: a row has no scene, or the ground truth no such attribute.
    """
    side = math.isqrt(len(cells))
    vectors, values, images = [], [], []
    boards = cell_features(features, grid, side)
    for row, (key, meta) in enumerate(zip(batch.keys, batch.meta, strict=True)):
        scene = meta.get("scene")
        if scene is None:
            raise ValueError(f"{key}: has no 'scene' in its ground truth, found {sorted(meta)}")
        if attribute in scene and attribute != "objects":
            vectors.append(boards[row].flatten())
            values.append(str(scene[attribute]))
            images.append(row)
            continue
        for item in scene["objects"]:
            if attribute not in item:
                raise ValueError(f"attribute: found '{attribute}', expected {sorted({*item, *scene} - {'objects', 'jitter'})}")
            vectors.append(boards[row, cells.index(item["cell"])])
            values.append(str(item[attribute]))
            images.append(row)
    return torch.stack(vectors) if vectors else features.new_zeros(0, 1), values, images


def fit_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, hidden: int, steps: int = 400) -> float:
    """Accuracy on ``test`` of a probe learnt on ``train``; hidden 0 is linear.

    Args:
        train: features ``[n, D]`` and labels ``[n]``.
        test: the same, of other images.
        classes: number of values.
        hidden: width of the hidden layer.
        steps: updates of 256 rows.
    """
    mean, std = train[0].mean(dim=0), train[0].std(dim=0) + 1e-6
    x, y = (train[0] - mean) / std, train[1]
    cut = max(1, len(x) // 6)
    best, chosen = -1.0, WEIGHT_DECAYS[0]
    for decay in WEIGHT_DECAYS:
        accuracy = _accuracy(_trained(x[cut:], y[cut:], classes, hidden, decay, steps), x[:cut], y[:cut])
        if accuracy > best:
            best, chosen = accuracy, decay
    return _accuracy(_trained(x, y, classes, hidden, chosen, steps), (test[0] - mean) / std, test[1])


def _trained(x: Tensor, y: Tensor, classes: int, hidden: int, decay: float, steps: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = x.shape[1]
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes)] if hidden else [nn.Linear(width, classes)]
    probe = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (min(256, len(x)),), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(probe(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return probe


@torch.no_grad()
def _accuracy(probe: nn.Module, x: Tensor, y: Tensor) -> float:
    return (probe(x).argmax(dim=1) == y).float().mean().item()


@torch.no_grad()
def part_features(part: nn.Module | None, images: Tensor, layer: Layer, cells: int = 4) -> Features:
    """Tokens ``[B, N, D]`` and their grid.

    Those of an encoder are its patches at a layer, or its one vector in as many blocks as there are cells, only the cell's own
    filled (so that a linear probe has weights of its own for each cell); of a vision-language model the states at its image tokens;
    of a codec its latents; of None 4 x 4 px blocks of pixels.

    Raises:
        TypeError: the part is none of these.
        ValueError: it has no such layer.
    """
    if isinstance(part, FeatureEncoder):
        if layer == "pooled":
            blocks = torch.einsum("bf,cd->bcdf", part(images).float(), torch.eye(cells, device=images.device))
            return blocks.flatten(2), (math.isqrt(cells), math.isqrt(cells))
        return part.tokens(images, layer).float(), part.grid
    if isinstance(part, VLMBackbone):
        return image_states(part, images, layer)
    if part is None:
        board = F.pixel_unshuffle(images, 4)
    elif isinstance(part, LatentCodec):
        board = part.encode(images).float()
    else:
        expected = "a FeatureEncoder, a LatentCodec or a VLMBackbone"
        raise TypeError(f"part: found a {type(part).__name__}, expected {expected}")
    return board.flatten(2).transpose(1, 2), (board.shape[2], board.shape[3])


def image_states(vlm: VLMBackbone, images: Tensor, layer: Layer) -> Features:
    """What enters (layer 0) or leaves (-1) the language model at the image tokens of square images, and their grid.

    Raises:
        ValueError: another layer.
    """
    if layer not in (0, -1):
        raise ValueError(f"layer: found {layer} for a {type(vlm).__name__}, expected 0 (what enters its language model) and -1")
    prompt: Conversation = [{"role": "user", "text": f"{IMAGE_MARKER}\nDescribe the image."}]
    inputs = vlm.embed([prompt] * len(images), images, [1] * len(images))
    states = inputs.embeddings if layer == 0 else vlm(inputs).hidden  # [B, L, D]
    tokens = states[inputs.image_mask].view(len(images), -1, states.shape[-1]).float()  # [B, N, D]
    side = math.isqrt(tokens.shape[1])
    return tokens, (side, side)


def probe(
    part: nn.Module | None,
    batches: list[Batch],
    attribute: str,
    layer: Layer,
    cells: list[str],
    hidden: int = 128,
    steps: int = 400,
    features: list[Features] | None = None,
) -> ProbeResult:
    """Read an attribute from the features of a part.

    Args:
        part: an encoder, a codec, a vision-language model, or None for the pixels themselves.
        batches: labelled images.
        attribute: of the objects or of the scene.
        layer: of an encoder or a vision-language model.
        cells: names of the cells in reading order.
        hidden: width of the MLP probe; 0 trains the linear one alone.
        steps: updates of each probe.
        features: what ``part_features`` gives for each batch, where it is known already.

    Raises:
        ValueError: fewer than 40 rows have the attribute.
    """
    vectors, values, images, seen = [], [], [], 0
    if features is None:
        features = [part_features(part, image_of_each_row(batch), layer, len(cells)) for batch in batches]
    for batch, (tokens, grid) in zip(batches, features, strict=True):
        some, names, rows = labelled_rows(batch, tokens, grid, attribute, cells)
        vectors.append(some)
        values += names
        images += [seen + row for row in rows]
        seen += len(batch)
    if len(values) < 40:
        raise ValueError(f"shards: found {len(values)} rows with '{attribute}', expected 40 or more")
    x, classes = torch.cat([some for some in vectors if len(some)]), sorted(set(values))
    y = torch.tensor([classes.index(value) for value in values])
    test = torch.tensor(images) % 4 == 3  # by image: two objects of one image never stand on both sides
    train_rows, test_rows = (x[~test], y[~test]), (x[test], y[test])
    chance = y[test].bincount().max().item() / int(test.sum())
    linear = fit_probe(train_rows, test_rows, len(classes), 0, steps)
    mlp = fit_probe(train_rows, test_rows, len(classes), hidden, steps) if hidden else linear
    return ProbeResult(attribute, linear, mlp, chance, int((~test).sum()), int(test.sum()))


def load_part(source: str) -> nn.Module | None:
    """A part from an exported folder, a run folder, a checkpoint, an experiment file (untrained), ``CLASS:FOLDER``, or ``pixels``.

    Raises:
        ValueError: the method has no encoder, tower, codec or vlm.
    """
    from umm_zoo.experiment.build import build
    from umm_zoo.experiment.file import load_experiment
    from umm_zoo.method import Method

    if source == "pixels":
        return None
    if (card := Path(source) / "card.json").is_file():
        part: nn.Module = build({**json.loads(card.read_text(encoding="utf-8"))["load"], "source": source})
        return part.eval()
    if ":" in source:
        target, folder = source.split(":", 1)
        part = build({"_target_": f"{target}.from_pretrained", "source": folder})
        return part.eval()
    if source.endswith((".yaml", ".yml")):
        experiment = load_experiment(source)
        torch.manual_seed(experiment.seed)
        method: Any = build(experiment.method)
    else:
        method = Method.load(source)
    for name in ("encoder", "tower", "codec", "vlm"):
        if isinstance(found := getattr(method, name, None), FeatureEncoder | LatentCodec | VLMBackbone):
            return found.eval()
    raise ValueError(
        f"{source}: {type(method).__name__} has parts {sorted(method.parts())}, expected an encoder, tower, codec or vlm"
    )


def load_batches(shards: str, image_size: int, limit: int) -> tuple[list[Batch], list[str]]:
    """Labelled images of shards in their own order, and the names of the cells of their world (read from ``world.json``)."""
    from data_pipelines.shards.addresses import expand
    from data_pipelines.shards.data import ShardData, ShardSource
    from umm_zoo.shapes.scenes import PLACES

    data = ShardData(val={"probe": ShardSource(shards)}, image_size=image_size, val_batch_size=256)
    data.prepare_data()
    batches, rows = [], 0
    for batch in data.val_dataloader():
        batches.append(batch)
        rows += len(batch)
        if rows >= limit:
            break
    world = Path(expand(shards)[0]).parent.parent / "world.json"
    cells = json.loads(world.read_text(encoding="utf-8"))["world"]["cells"] if world.is_file() else 2
    return batches, list(PLACES[cells])


def parse_layer(text: str) -> Layer:
    return "pooled" if text == "pooled" else int(text)


def main() -> None:
    assert __doc__ is not None
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
    try:
        part = load_part(arguments.part)
        batches, cells = load_batches(arguments.shards, arguments.image_size, arguments.limit)
        for attribute in arguments.attribute:
            result = probe(part, batches, attribute, arguments.layer, cells, steps=arguments.steps)
            print(json.dumps(asdict(result)) if arguments.json else result, flush=True)
    except (ValueError, TypeError, FileNotFoundError) as error:
        sys.exit(f"probe: {error}")


if __name__ == "__main__":
    main()
