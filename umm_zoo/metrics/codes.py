"""How evenly a quantizer uses its codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from umm_zoo.batch import Batch
from umm_zoo.errors import Count, UserError
from umm_zoo.metrics.rows import required
from umm_zoo.outputs import Outputs


class CodeUsage(Metric):
    """Use of the codes of a quantizer over the set: means over the D codes of a token, but where it says otherwise.

    ``usage``: share of the codes that occur; ``dead``: codes that never do, in all tables together; ``perplexity``: exponential of
    the entropy of their frequencies, at most ``num_codes``; ``bits``: that entropy in bits, summed over the D codes. A high usage
    is no measure of success: a table can be used whole by a model that reconstructs nothing.

    Args:
        num_codes: K.
        codes_per_token: D.
    """

    reads = ("codes",)
    scores = ("usage", "dead", "perplexity", "bits")
    full_state_update = False
    counts: Tensor

    def __init__(self, num_codes: Count, codes_per_token: Count = 1) -> None:
        super().__init__()
        self.num_codes, self.codes_per_token = num_codes, codes_per_token
        self.add_state("counts", torch.zeros(codes_per_token, num_codes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Count the codes of a batch.

        Raises:
            UserError: a token has another number of codes, or one is out of range.
        """
        for codes in required(outputs, "codes", self):
            if codes.shape[-1] != self.codes_per_token:
                found, expected = f"{codes.shape[-1]} codes per token", f"codes_per_token: {self.codes_per_token}"
                raise UserError("metrics.CodeUsage", found, expected)
            if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
                raise UserError("metrics.CodeUsage", f"the code {int(codes.max())}", f"codes below num_codes: {self.num_codes}")
            for place, column in enumerate(codes.flatten(0, -2).unbind(dim=-1)):
                self.counts[place] += torch.bincount(column, minlength=self.num_codes)

    def compute(self) -> dict[str, Tensor]:
        """The four scores; empty without any code."""
        if not self.counts.any():
            return {}
        share = self.counts.double() / self.counts.sum(dim=1, keepdim=True)
        nats = torch.special.entr(share).sum(dim=1)  # [D]
        used = (self.counts > 0).sum(dim=1)
        return {
            "usage": (used / self.num_codes).mean(),
            "dead": (self.num_codes - used).sum(),
            "perplexity": nats.exp().mean(),
            "bits": nats.sum() / math.log(2),
        }
