"""Training of a method on one batch, over and over, without a trainer."""

from __future__ import annotations

from umm_zoo.batch import Batch
from umm_zoo.method import Method


def losses_of(method: Method, batch: Batch, steps: int) -> list[float]:
    """The loss before each of so many updates of the method's own optimiser."""
    made = method.configure_optimizers()
    optimizer, losses = made["optimizer"] if isinstance(made, dict) else made, []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = method.training_losses(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
