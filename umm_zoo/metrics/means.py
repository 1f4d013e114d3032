"""Metrics that average the numbers that a method's validation step names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.metrics.rows import NAME_WORDS, RowMetric, checked_names, name_to_words, words_to_name
from umm_zoo.outputs import Outputs


class Means(RowMetric):
    """Means over the whole set of scalars that ``validation_step`` makes by name: losses, ``NAME_accuracy`` and the like.

    A batch's scalar is the mean over something. ``Outputs.counts`` says over how many of what (the labelled cells, the rows with a
    hard negative); a name that is not in it counts each row of the batch once. With its count a value is the same however the rows
    fall into batches and ranks. A batch in which there was nothing to average (count 0) is left out, whatever number stands for it.

    A loss that is itself a function of the whole batch (a contrast, a covariance) has no value for a set; what is given then is the
    mean over batches, weighted by rows, to be compared at one ``val_batch_size`` only.

    Args:
        names: scalars to average; None takes every one that is made.

    Raises:
        UserError: one of ``names`` is not among the scalars.
    """

    def __init__(self, names: list[str] | None = None) -> None:
        super().__init__()
        self.names, self.reads = names, tuple(checked_names("names", names) or ())
        self.scores = self.scores or self.reads or None

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Keep value and count of each name."""
        scalars = outputs.scalars
        for name in self.names or ():
            if name not in scalars:
                raise UserError("metrics.Means", f"the scalars {sorted(scalars)}", f"'{name}' among what validation_step returns")
        chosen = scalars if self.names is None else {name: scalars[name] for name in self.names}
        self.add(chosen, {name: outputs.counts.get(name, len(batch)) for name in chosen})

    def add(self, means: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Keep means over so many."""
        records = []
        for name, mean in means.items():
            if count := float(counts[name]):
                sums = torch.tensor([float(mean) * count, count], dtype=torch.float64)
                records.append([*name_to_words(name), *sums.view(torch.int64).tolist()])  # bits: records are whole numbers
        self.add_rows(records)

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """One mean per name, in alphabetical order."""
        names, group = torch.unique(records[:, :NAME_WORDS], dim=0, return_inverse=True)
        sums = records[:, NAME_WORDS:].contiguous().view(torch.float64)  # [rows, 2]: total, count
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=sums.device).index_add(0, group, sums)
        means = {words_to_name(name.tolist()): total / count for name, (total, count) in zip(names, sums, strict=True)}
        return dict(sorted(means.items()))


class AttentionBias(Means):
    """Mean of how much more queries of a bridge attend to an image token than to a word.

    ``compute`` gives ``attention_bias``, the difference of the mean attention to a token of either kind, and
    ``attention_log_bias``, that of its logarithm. Batches whose attention was not measured are left out.
    """

    scores = ("attention_bias", "attention_log_bias")

    def __init__(self) -> None:
        super().__init__()
        self.reads = ("attention",)

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Keep the ``attention`` of a batch."""
        if (seen := outputs.attention) is not None:
            means = {"attention_bias": seen.bias, "attention_log_bias": seen.log_bias}
            self.add(means, dict.fromkeys(means, seen.num_rows))
