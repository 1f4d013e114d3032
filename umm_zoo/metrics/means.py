"""Means of whatever numbers a method's validation step names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import MistakeError
from umm_zoo.metrics.rows import NAME_WORDS, RowMetric, name_to_words, words_to_name


class Means(RowMetric):
    """The mean over the whole set of scalars that ``validation_step`` returns by name: losses, ``NAME_accuracy`` and the like.

    A batch's scalar is the mean over something. ``outputs["counts"]``, a map from name to number, says over how many of what (the
    labelled cells, the rows with a hard negative); a name that is not in it counts each row of the batch once. With its count a
    value is the same however the rows fall into batches and ranks. A batch in which there was nothing to average (count 0) is left
    out, whatever number stands for it.

    A loss that is itself a function of the whole batch (a contrast, a covariance) has no value for a set; what is given then is the
    mean over batches, weighted by rows, to be compared at one ``val_batch_size`` only.

    Args:
        names: outputs to average; None takes every scalar that is returned.

    Raises:
        ValueError: ``outputs`` lacks one of ``names``, or it is not a scalar.
    """

    def __init__(self, names: list[str] | None = None) -> None:
        super().__init__()
        self.names = names

    def update(self, outputs: dict[str, Any], batch: Batch) -> None:
        """Keep value and count of each name."""
        counts = outputs.get("counts") or {}
        scalars = {name: value for name, value in outputs.items() if _is_scalar(value)}
        for name in self.names or ():
            if name not in scalars:
                raise MistakeError(f"metrics.Means: validation_step must return the scalar '{name}', found {sorted(scalars)}")
        records = []
        for name in scalars if self.names is None else self.names:
            count = float(counts.get(name, len(batch)))
            if count:
                sums = torch.tensor([float(scalars[name]) * count, count], dtype=torch.float64)
                records.append([*name_to_words(name), *sums.view(torch.int64).tolist()])  # bits: records are whole numbers
        self.add_rows(records)

    def compute(self) -> dict[str, Tensor]:
        """One mean per name, in alphabetical order; empty when nothing was seen."""
        records = self.records()
        if not len(records):
            return {}
        names, group = torch.unique(records[:, :NAME_WORDS], dim=0, return_inverse=True)
        sums = records[:, NAME_WORDS:].contiguous().view(torch.float64)  # [rows, 2]: total, count
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=sums.device).index_add(0, group, sums)
        means = {words_to_name(name.tolist()): total / count for name, (total, count) in zip(names, sums, strict=True)}
        return dict(sorted(means.items()))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)
