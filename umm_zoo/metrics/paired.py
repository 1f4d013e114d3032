"""Metric of questions that count in pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.metrics.answers import normalise
from umm_zoo.metrics.rows import RowMetric, digest, required
from umm_zoo.outputs import Outputs


def pair_rates(pairs: Tensor, right: Tensor) -> dict[str, Tensor]:
    """``paired``, ``single`` and ``incomplete`` of rows ``[rows]``, by their pair and whether they are right.

    A pair that comes several times with both of its rows, as a bootstrap draws it, counts as often.
    """
    _, pair, sizes = torch.unique(pairs, return_inverse=True, return_counts=True)
    rights = torch.zeros_like(sizes).index_add(0, pair, right.to(sizes.dtype))
    complete = sizes % 2 == 0
    rows = sizes[complete].sum().double()
    paired, single = sizes[complete & (rights == sizes)].sum() / rows, rights[complete].sum() / rows
    return {"incomplete": (~complete).sum().double(), "paired": paired, "single": single}


class PairedAccuracy(RowMetric):
    """MMVP's accuracy (Tong et al., 2024, arXiv 2401.06209, section 2): a pair is right when both of its rows are.

    The two rows of a pair show images that differ in one detail and ask the same question, so answering from language alone gives
    one right and one wrong, and scores nothing. Rows share ``meta["pair"]``; rows without it are left out. They may arrive in
    different batches and on different ranks. ``compute`` gives ``paired``, ``single`` (accuracy over the same rows), and
    ``incomplete``, the number of pairs of which only one row was seen: excluded from both accuracies, never guessed.

    Raises:
        UserError: there are no ``answers``, or more than two rows share a pair (a repeated sample, or two data sets with the same
            names).
    """

    reads = ("answers",)
    scores = ("incomplete", "paired", "single")

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        answers, truths = required(outputs, "answers", self), batch.answers()
        for row in self.chosen(batch):
            if (pair := batch.meta[row].get("pair")) is not None:
                source = batch.keys[row].split("/", 1)[0] if "/" in batch.keys[row] else ""
                yield [digest(f"{source}/{pair}"), int(normalise(answers[row]) == normalise(truths[row]))]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """``paired``, ``single``, ``incomplete``; the accuracies are NaN without a complete pair."""
        if (sizes := torch.unique(records[:, 0], return_counts=True)[1]).gt(2).any():
            raise UserError("metrics.PairedAccuracy", f"{int((sizes > 2).sum())} pairs of more than two rows", "two")
        return pair_rates(records[:, 0], records[:, 1])
