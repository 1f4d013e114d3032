"""Linear and small-MLP probes of a part's features for any attribute of the ground truth.

An attribute of objects (colour, shape, size, mark …) is asked of every cell that holds one, from the features of that cell; an
attribute of the scene (background, stripes) of each image, from one vector. Of a vision-language model the states at the image
tokens are read: what enters its language model (layer 0) or leaves it (layer -1); the question stands behind the image and cannot
reach them. The probe learns on three quarters of the images and is scored on the rest; the best of a few weight decays is chosen
on a slice of the former.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, image_of_each_row, stacked

#: Of an encoder: counted from its end, or ``pooled`` for its one vector. Of a vision-language model: 0 or -1.
Layer = int | Literal["pooled"]

#: Tokens ``[B, N, D]`` and their grid.
Features = tuple[Tensor, tuple[int, int]]

#: Parts that have features, in the order in which a run is searched for one.
PROBED = ("encoder", "tower", "codec", "vlm")

WEIGHT_DECAYS = (0.0, 0.01, 0.1)


@dataclass(frozen=True)
class ProbeResult:
    """Readability of an attribute: accuracies on ``num_test`` held-out rows; ``chance`` is that of the commonest value."""

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
    """``[B, h*w, D]`` to ``[B, side*side, F]``: a cell's tokens side by side where they divide evenly, else their average."""
    B, _, D = tokens.shape
    h, w = grid
    board = tokens.transpose(1, 2).reshape(B, D, h, w)
    if h % side or w % side:
        return F.adaptive_avg_pool2d(board, side).flatten(2).transpose(1, 2)
    board = board.reshape(B, D, side, h // side, side, w // side).permute(0, 2, 4, 1, 3, 5)
    return board.reshape(B, side * side, -1)


def labelled_rows(
    batch: Batch, features: Tensor, grid: tuple[int, int], attribute: str, cells: list[str]
) -> list[tuple[Tensor, str, int]]:
    """(feature, value, number of the image) wherever a batch has the attribute, of patch tokens ``[B, N, D]``.

    Raises:
        ValueError: a row has no scene, or the ground truth no such attribute.
    """
    rows: list[tuple[Tensor, str, int]] = []
    boards = cell_features(features, grid, math.isqrt(len(cells)))
    for row, (key, meta) in enumerate(zip(batch.keys, batch.meta, strict=True)):
        if (scene := meta.get("scene")) is None:
            raise ValueError(f"{key}: has no 'scene' in its ground truth, found {sorted(meta)}")
        if attribute in scene and attribute != "objects":
            rows.append((boards[row].flatten(), str(scene[attribute]), row))
            continue
        for item in scene["objects"]:
            if attribute not in item:
                raise ValueError(f"attribute: found '{attribute}', expected {sorted({*item, *scene} - {'objects', 'jitter'})}")
            rows.append((boards[row, cells.index(item["cell"])], str(item[attribute]), row))
    return rows


def fit_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, hidden: int, steps: int = 400) -> float:
    """Accuracy on ``test`` of a probe learnt on ``train``, both features ``[n, D]`` and labels ``[n]``; hidden 0 is linear."""
    mean, std = train[0].mean(dim=0), train[0].std(dim=0) + 1e-6
    x, y = (train[0] - mean) / std, train[1]
    cut = max(1, len(x) // 6)
    scores = [_accuracy(_trained(x[cut:], y[cut:], classes, hidden, decay, steps), x[:cut], y[:cut]) for decay in WEIGHT_DECAYS]
    chosen = WEIGHT_DECAYS[scores.index(max(scores))]
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
    filled (so that a linear probe has weights of its own for each cell); of a vision-language model the states at its image tokens,
    before (layer 0) or behind (-1) its language model; of a codec its latents; of None 4 x 4 px blocks of pixels.

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
        tokens = _image_states(part, images, layer)
        return tokens, (math.isqrt(tokens.shape[1]), math.isqrt(tokens.shape[1]))
    if part is not None and not isinstance(part, LatentCodec):
        raise TypeError(f"part: found a {type(part).__name__}, expected a FeatureEncoder, a LatentCodec or a VLMBackbone")
    board = F.pixel_unshuffle(images, 4) if part is None else part.encode(images).float()
    return board.flatten(2).transpose(1, 2), (board.shape[2], board.shape[3])


def _image_states(vlm: VLMBackbone, images: Tensor, layer: Layer) -> Tensor:
    if layer not in (0, -1):
        raise ValueError(f"layer: found {layer} for a {type(vlm).__name__}, expected 0 (what enters its language model) and -1")
    prompt: Conversation = [{"role": "user", "text": f"{IMAGE_MARKER}\nDescribe the image."}]
    inputs = vlm.embed([prompt] * len(images), images, [1] * len(images))
    states = inputs.embeddings if layer == 0 else vlm(inputs).hidden  # [B, L, D]
    return states[inputs.image_mask].view(len(images), -1, states.shape[-1]).float()


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
    if features is None:
        features = [part_features(part, stacked(image_of_each_row(batch)), layer, len(cells)) for batch in batches]
    rows, seen = [], 0
    for batch, (tokens, grid) in zip(batches, features, strict=True):
        rows += [(vector, value, seen + image) for vector, value, image in labelled_rows(batch, tokens, grid, attribute, cells)]
        seen += len(batch)
    if len(rows) < 40:
        raise ValueError(f"shards: found {len(rows)} rows with '{attribute}', expected 40 or more")
    vectors, values, images = zip(*rows, strict=True)
    x, classes = torch.stack(vectors), sorted(set(values))
    y = torch.tensor([classes.index(value) for value in values])
    test = torch.tensor(images) % 4 == 3  # by image: two objects of one image never stand on both sides
    train_rows, test_rows = (x[~test], y[~test]), (x[test], y[test])
    chance = y[test].bincount().max().item() / int(test.sum())
    linear = fit_probe(train_rows, test_rows, len(classes), 0, steps)
    mlp = fit_probe(train_rows, test_rows, len(classes), hidden, steps) if hidden else linear
    return ProbeResult(attribute, linear, mlp, chance, int((~test).sum()), int(test.sum()))


def load_part(source: str) -> nn.Module | None:
    """A part of an exported folder, a run folder, a checkpoint, an experiment file (untrained), ``CLASS:FOLDER``, or ``pixels``."""
    from umm_zoo.experiment.build import build, build_embedded, build_method
    from umm_zoo.experiment.check import check
    from umm_zoo.experiment.file import load_experiment
    from umm_zoo.method import Method
    from umm_zoo.release.parts import find_part

    part: nn.Module
    if source == "pixels":
        return None
    if (card := Path(source) / "card.json").is_file():
        node = {**json.loads(card.read_text(encoding="utf-8"))["load"], "source": source}
        part = build_embedded(node, nn.Module, "load", card)
    elif ":" in source:
        target, folder = source.split(":", 1)
        part = build({"_target_": f"{target}.from_pretrained", "source": folder})
    elif source.endswith((".yaml", ".yml")):
        check(experiment := load_experiment(source))
        torch.manual_seed(experiment.seed)
        part = find_part(build_method(experiment.method_tree), source, PROBED)[1]
    else:
        part = find_part(Method.load(source), source, PROBED)[1]
    return part.eval()


def load_batches(shards: str, image_size: int, limit: int) -> tuple[list[Batch], list[str]]:
    """Labelled images of shards in their own order, and the names of the cells of their world (read from ``world.json``)."""
    from data_pipelines.shards.data import ShardData, ShardSource
    from data_pipelines.shards.expanding import expand
    from umm_zoo.shapes.scenes import PLACES

    data = ShardData(val={"probe": ShardSource(shards)}, image_size=image_size, val_batch_size=256)
    data.prepare_data()
    batches = list(islice(data.val_dataloader(), -(-limit // 256)))
    world = Path(expand(shards)[0]).parent.parent / "world.json"
    cells = json.loads(world.read_text(encoding="utf-8"))["world"]["cells"] if world.is_file() else 2
    return batches, list(PLACES[cells])
