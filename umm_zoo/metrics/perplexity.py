"""Metric of true answers: their perplexity."""

from __future__ import annotations

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.metrics.rows import RowMetric, required
from umm_zoo.outputs import Outputs


class Perplexity(RowMetric):
    """exp(sum of the tokens' negative log-likelihood / number of tokens), over all chosen rows together.

    Not the mean of per-batch perplexities, which depends on how rows fall into batches. NaN when no token was seen.

    Raises:
        UserError: there is no ``nll`` or no ``num_tokens``.
    """

    reads = ("nll", "num_tokens")
    record_dtype = torch.float64  # the sum must not depend on the number of ranks

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Add the chosen rows of ``nll`` and ``num_tokens``."""
        if rows := self.chosen(batch):
            self.add_rows(torch.stack([required(outputs, name, self)[rows].double() for name in self.reads], dim=1))

    def compute(self) -> Tensor:
        """The perplexity."""
        if not len(records := self.records()):
            return torch.tensor(torch.nan)
        nll, num_tokens = records.sum(dim=0)
        return (nll / num_tokens).exp()
