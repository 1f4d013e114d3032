"""Perplexity of true answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from umm_zoo.batch import Batch
from umm_zoo.metrics.rows import chosen_rows, required
from umm_zoo.outputs import Outputs


class Perplexity(Metric):
    """exp(sum of the tokens' negative log-likelihood / number of tokens), over all chosen rows together.

    Not the mean of per-batch perplexities, which depends on how rows fall into batches. NaN when no token was seen.

    Args:
        kinds, tasks: count these rows only.

    Raises:
        UserError: there is no ``nll`` or no ``num_tokens``.
    """

    reads = ("nll", "num_tokens")
    full_state_update = False
    higher_is_better = False
    nll: Tensor
    num_tokens: Tensor

    def __init__(self, kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        super().__init__()
        self.kinds, self.tasks = kinds, tasks
        # float64: the sum must not depend on the number of ranks
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Add the chosen rows of ``nll`` and ``num_tokens``."""
        rows = chosen_rows(batch, self.kinds, self.tasks)
        self.nll += required(outputs, "nll", self)[rows].double().sum()
        self.num_tokens += required(outputs, "num_tokens", self)[rows].double().sum()

    def compute(self) -> Tensor:
        """The perplexity."""
        return (self.nll / self.num_tokens).exp()
