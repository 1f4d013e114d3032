"""Size of a validation: how long answers may be, and for how many batches images are generated."""

from __future__ import annotations

from dataclasses import replace

from lightning import Callback, LightningModule, Trainer

from umm_zoo.method import Method
from umm_zoo.outputs import Wanted


class Validation(Callback):
    """Callback that sets how much a method makes at each validation; nothing of it touches training.

    Args:
        max_new_tokens: longest answer; 0 makes none.
        num_generated_batches: batches of each validation whose images are generated; None is all.

    Raises:
        ValueError: a number is negative.
    """

    def __init__(self, max_new_tokens: int = Wanted.max_new_tokens, num_generated_batches: int | None = None) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("num_generated_batches", num_generated_batches or 0)):
            if value < 0:
                raise ValueError(f"Validation.{name}: found {value}, expected 0 or more")
        self.max_new_tokens, self.num_generated_batches = max_new_tokens, num_generated_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set it in the method."""
        if isinstance(pl_module, Method):
            longest, batches = self.max_new_tokens, self.num_generated_batches
            pl_module.wanted = replace(pl_module.wanted, max_new_tokens=longest, num_generated_batches=batches)
