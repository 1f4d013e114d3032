"""Method that trains a vision tower on ground truth, so that what its features carry is known."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.by_shape import by_shape
from umm_zoo.backbones.feature_encoder import LibraryEncoder
from umm_zoo.backbones.precision import resize_to
from umm_zoo.batch import Batch, Grid, image_of_each_row, map_by_size
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.outputs import Outputs

#: Label of a cell that says nothing: no object there, or the attribute is not labelled in this image.
UNLABELLED = -100


class CellLabels:
    """Ground truth of a scene as one class per cell and attribute, from ``meta["scene"]["objects"]``.

    Args:
        cells: names of the cells in reading order, a square number of them.
        attributes: name of each attribute of an object and its values.
        shares: share of the images in which an attribute is labelled, 1 where not named. The choice is a function of the row's
            name, so an image is labelled in every epoch or in none.

    Raises:
        ValueError: the number of cells is not a square, or ``shares`` names an unknown attribute.
    """

    def __init__(self, cells: list[str], attributes: dict[str, list[str]], shares: dict[str, float] | None = None) -> None:
        self.cells, self.attributes, self.shares = cells, attributes, dict(shares or {})
        self.side = math.isqrt(len(cells))
        if self.side**2 != len(cells):
            raise ValueError(f"CellLabels.cells: found {len(cells)}, expected a square number")
        for name in self.shares:
            if name not in attributes:
                raise ValueError(f"CellLabels.shares: found '{name}', expected {sorted(attributes)}")

    def __call__(self, batch: Batch, everything: bool = False) -> dict[str, Tensor]:
        """Labels ``[B, cells]`` of each attribute, ``UNLABELLED`` where there is none; ``everything`` ignores ``shares``.

        Last comes ``occupied``: 1 where a cell holds an object, 0 elsewhere.

        Raises:
            UserError: a row has no scene, or an object's attribute a value that is not listed.
        """
        labels = {name: torch.full((len(batch), len(self.cells)), UNLABELLED) for name in self.attributes}
        labels["occupied"] = torch.zeros(len(batch), len(self.cells), dtype=torch.long)
        for row, (key, meta) in enumerate(zip(batch.keys, batch.meta, strict=True)):
            if "scene" not in meta:
                raise UserError(key, f"the ground truth {sorted(meta)}", "a 'scene' among it")
            for item in meta["scene"]["objects"]:
                cell = _index(self.cells, item["cell"], key)
                labels["occupied"][row, cell] = 1
                for name, values in self.attributes.items():
                    if everything or zlib.crc32(f"{name} {key}".encode()) < self.shares.get(name, 1.0) * 2**32:
                        labels[name][row, cell] = _index(values, item[name], key)
        return labels


def cell_means(tokens: Tensor, grid: Grid, side: int) -> Tensor:
    """Mean feature of each cell of a square board, ``[B, N, D]`` in raster order to ``[B, side * side, D]``."""
    B, _, D = tokens.shape
    board = tokens.transpose(1, 2).reshape(B, D, grid.h, grid.w)
    return F.adaptive_avg_pool2d(board, side).flatten(2).transpose(1, 2)


def labels_of_tokens(labels: Tensor, grid: Grid, side: int) -> Tensor:
    """The label of the cell in which each token's centre lies, ``[B, side * side]`` to ``[B, h * w]``, both in raster order."""
    return labels[:, _cells(labels.device, grid, side)]


@by_shape
def _cells(grid: Grid, side: int) -> Tensor:
    rows, columns = (((torch.arange(size) + 0.5) * side / size).long() for size in grid)
    return (rows[:, None] * side + columns).flatten()


def labels_of_scene(batch: Batch, name: str, values: list[str]) -> Tensor:
    """One class per row, ``[B]``, from ``meta["scene"][name]``.

    Raises:
        UserError: a row's scene has no such attribute, or a value that is not listed.
    """
    found = []
    for key, meta in zip(batch.keys, batch.meta, strict=True):
        if name not in (scene := meta.get("scene", {})):
            raise UserError(key, f"a scene with {sorted(scene)}", f"'{name}' among them")
        found.append(_index(values, scene[name], key))
    return torch.tensor(found)


def _index(values: list[str], value: str, key: str) -> int:
    if value not in values:
        raise UserError(key, f"'{value}' in the ground truth", f"one of {values}")
    return values.index(value)


class SupervisedTower(Method):
    """Method that names each attribute of the object in each cell, from patch features of the last and the last but one layer.

    LLaVA and ROSS look through the last but one layer of a frozen tower. A reconstruction loss can only help a language model with
    what that layer carries, so a toy needs a tower of which this is known: one trained with the fine detail among its attributes,
    and as a control one trained without. Each cell's features are averaged, and a linear layer behind a LayerNorm names the
    attribute; so what is learnt can be read out linearly. Attributes are those of cells that hold an object; a further head
    says which do. Images may have any sizes; each is squeezed to the tower's.

    Args:
        tower: trained.
        labels: where the ground truth of cells comes from.
        scene_attributes: attributes of the whole scene and their values, named from the pooled vector (it trains the final norm).
        layers: whose features are read.
    """

    def __init__(
        self,
        tower: LibraryEncoder,
        labels: CellLabels,
        scene_attributes: dict[str, list[str]] | None = None,
        layers: tuple[int, ...] = (-2, -1),
    ) -> None:
        super().__init__()
        self.tower, self.labels, self.layers = tower, labels, list(layers)
        self.scene_attributes = dict(scene_attributes or {})
        heads: dict[str, nn.Module] = {
            f"{name}_{-layer}": nn.Sequential(nn.LayerNorm(tower.token_width), nn.Linear(tower.token_width, len(values)))
            for layer in layers
            for name, values in labels.attributes.items()
        }
        heads |= {f"{name}_scene": nn.Linear(tower.width, len(values)) for name, values in self.scene_attributes.items()}
        heads |= {
            f"occupied_{-layer}": nn.Sequential(nn.LayerNorm(tower.token_width), nn.Linear(tower.token_width, 2))
            for layer in layers
        }
        self.heads = nn.ModuleDict(heads)

    def parts(self) -> dict[str, nn.Module]:
        """``tower`` and ``heads``."""
        return {"tower": self.tower, "heads": self.heads}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of each attribute, averaged over the labelled cells, summed over attributes and layers."""
        losses, _, labels = self._losses(batch, everything=False)
        return summed_over_step(self, losses, {head: labels[head.rsplit("_", 1)[0]] for head in self.heads})

    def units(self, batch: Batch) -> dict[str, float]:
        """Labels by head."""
        labels = self.labels(batch)
        labels |= {name: labels_of_scene(batch, name, values) for name, values in self.scene_attributes.items()}
        return {head: count_labels(labels[head.rsplit("_", 1)[0]]) for head in self.heads}

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        names = dict.fromkeys(head.rsplit("_", 1)[0] for head in self.heads)
        return ("loss", *self.heads, *(f"{name}_accuracy" for name in names))

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """The losses over all labels, ``NAME_accuracy`` of each attribute by the first of ``layers``, and ``counts`` of both."""
        return scored({head: head.rsplit("_", 1)[0] for head in self.heads}, *self._losses(batch, everything=True))

    def _losses(self, batch: Batch, everything: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Losses; and by attribute what is named and what should be, ``UNLABELLED`` where there is no label."""
        pixels = torch.stack(map_by_size(self._pixels, image_of_each_row(batch)))  # [B, 3, S, S]
        labels = {name: values.to(pixels.device) for name, values in self.labels(batch, everything).items()}
        losses: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        output = self.tower.vision(pixels, output_hidden_states=True)
        for layer in self.layers:
            cells = cell_means(self.tower.patches(output, layer), self.tower.grid, self.labels.side)  # [B, cells, D]
            for name, wanted in labels.items():
                logits = self.heads[f"{name}_{-layer}"](cells)  # [B, cells, values]
                losses[f"{name}_{-layer}"] = labelled_cross_entropy(logits, wanted)
                found.setdefault(name, logits.argmax(dim=-1))
        if self.scene_attributes:
            pooled = self.tower.pooled(output)  # [B, F]
            for name, values in self.scene_attributes.items():
                labels[name] = labels_of_scene(batch, name, values).to(pooled.device)
                logits = self.heads[f"{name}_scene"](pooled)  # [B, values]
                losses[f"{name}_scene"] = F.cross_entropy(logits, labels[name])
                found[name] = logits.argmax(dim=-1)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}, found, labels

    def _pixels(self, images: Tensor) -> Tensor:
        """Images of one size as the tower takes them, squeezed where they have another: all cells are seen."""
        return self.tower.pixels(resize_to(images, self.tower.image_size, None, self.tower.interpolation), whole=True)


def scored(
    heads: Mapping[str, str], losses: Mapping[str, Tensor], found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> Outputs:
    """Losses, and ``NAME_accuracy`` over what is labelled (NaN where nothing is), with counts; ``heads`` says what each names."""
    right = {f"{name}_accuracy": (found[name] == labels)[labels != UNLABELLED].float() for name, labels in wanted.items()}
    counts: dict[str, float] = {name: hits.numel() for name, hits in right.items()}
    counts |= {head: counts[f"{name}_accuracy"] for head, name in heads.items()}
    return Outputs({**losses, **{name: hits.mean() for name, hits in right.items()}}, counts)


def count_labels(labels: Tensor) -> int:
    """How many there are."""
    return int((labels != UNLABELLED).sum())


def summed_over_step(method: Method, losses: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means over the labels of each name as parts of those of the optimiser step, and their sum as ``loss``."""
    terms = {name: losses[name] * method.share(name, count_labels(of)) for name, of in labels.items()}
    return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def labelled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled cells; 0, still connected to the logits, where there is none."""
    labelled = labels != UNLABELLED
    if not labelled.any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits[labelled], labels[labelled])
