"""Metric of what a reader of codes can tell from them: ridge regressions onto the ground truth."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import Positive, several
from umm_zoo.metrics.rows import RowMetric, required
from umm_zoo.outputs import Outputs
from umm_zoo.shapes.scenes import PLACES

#: Parts of the rows; each is scored by a probe that has learnt from the others.
FOLDS = 5


class TokenProbe(RowMetric):
    """Accuracy of linear probes of ``tokens`` for attributes of the ground truth, learnt by ridge regression on the set itself.

    An attribute of the objects in ``meta["scene"]`` is asked of every cell that holds one, from the tokens of that cell, one of the
    scene or of ``meta`` itself (a class) of each image, from all. Tokens are averaged to 2 x 2 places of a cell first, so a probe
    reads four times their width: compare tokens of one width alone, for wide ones flatter. Of five parts of the images each is
    scored by a probe of the other four. ``compute`` gives a rate per attribute, and ``NAME_chance``, the share of the commonest
    value. Attributes that no row has are left out.

    Args:
        attributes: names.
        cells: of the scene along a side.
        ridge: added to the diagonal of the features' covariance, which are scaled to deviation 1 (our choice).
        kinds, tasks: see ``RowMetric``.

    Raises:
        UserError: there are no ``tokens``.
    """

    reads = ("tokens",)
    record_dtype = torch.float64

    def __init__(
        self,
        attributes: Sequence[str] = ("shape", "mark"),
        cells: int = 2,
        ridge: Positive = 0.1,
        kinds: list[str] | None = None,
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(kinds, tasks)
        several("TokenProbe.attributes", attributes, str)
        self.attributes, self.cells, self.ridge = tuple(attributes), cells, ridge
        self.scores = tuple(score for name in self.attributes for score in (name, f"{name}_chance"))

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Keep the places of every cell and image that has an attribute, beside what it is."""
        records, rows = [], self.chosen(batch)
        tokens = required(outputs, "tokens", self) if rows else []
        for row in rows:
            image = zlib.crc32(batch.keys[row].encode())
            for number, name in enumerate(self.attributes):
                for value, board in self._asked(batch.meta[row], name, tokens[row]):
                    label = torch.tensor([number, image, zlib.crc32(value.encode())], dtype=torch.float64)
                    records.append(torch.cat([label, board.double().flatten().cpu()]))
        if records:
            self.add_rows(torch.stack(records))

    def _asked(self, meta: Mapping[str, Any], name: str, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Values of an attribute in a row, each with its places ``[D, 2, 2]``."""
        scene, side = meta.get("scene") or {}, math.isqrt(len(tokens))
        board = tokens.float().T.unflatten(1, (side, side))
        if name in meta or name in scene:
            yield str(meta.get(name, scene.get(name))), F.adaptive_avg_pool2d(board, 2)
            return
        places = F.adaptive_avg_pool2d(board, 2 * self.cells)
        for item in scene.get("objects", ()):
            if name in item:
                row, column = divmod(PLACES[self.cells].index(item["cell"]), self.cells)
                yield str(item[name]), places[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Rates by attribute."""
        rates = {}
        for number, name in enumerate(self.attributes):
            own = records[records[:, 0] == number]
            if len(own) >= 2 * FOLDS:
                classes, truth = own[:, 2].unique(return_inverse=True)
                rates[name] = cross_fitted(own[:, 3:], truth, own[:, 1].long() % FOLDS, self.ridge)
                rates[f"{name}_chance"] = truth.bincount(minlength=len(classes)).max() / len(own)
        return rates


def cross_fitted(features: Tensor, truth: Tensor, fold: Tensor, ridge: float) -> Tensor:
    """Share of rows that a ridge regression onto their classes, learnt from the other folds, gets right.

    Args:
        features: ``[n, D]``.
        truth: ``[n]``, classes.
        fold: ``[n]``, to which part each belongs.
        ridge: beside a covariance of deviation 1.
    """
    wanted, right = F.one_hot(truth).to(features), torch.zeros((), dtype=features.dtype, device=features.device)
    for part in fold.unique():
        learnt, scored = fold != part, fold == part
        if not learnt.any():
            continue
        mean, deviation = features[learnt].mean(dim=0), features[learnt].std(dim=0) + 1e-6
        known, asked = ((features[rows] - mean) / deviation for rows in (learnt, scored))
        prior = wanted[learnt].mean(dim=0)
        covariance = known.T @ known / len(known) + ridge * torch.eye(known.shape[1]).to(known)
        weights = torch.linalg.solve(covariance, known.T @ (wanted[learnt] - prior) / len(known))
        right += ((asked @ weights + prior).argmax(dim=1) == truth[scored]).sum()
    return right / len(truth)
