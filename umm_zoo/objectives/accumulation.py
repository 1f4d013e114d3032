"""A loss in parts, of which only one keeps its activations at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


def accumulated(parts: Iterable[Callable[[], Tensor]], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The sum of the parts' losses, with their gradients already taken part by part.

    The result is linear in the parameters with exactly those gradients, so that the one backward pass that follows (Lightning's,
    with its hooks, clipping, and the exchange between ranks) costs nothing and keeps no activations. A policy gradient over ten
    sampling steps of an eight-billion decoder would otherwise hold ten graphs. Parameters that no part reaches get gradient zero.

    Args:
        parts: called one after the other; each returns a scalar.
        parameters: those trained.
    """
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    value = torch.zeros((), device=parameters[0].device)
    with torch.enable_grad():
        for part in parts:
            torch.clear_autocast_cache()  # weights that a rollout without gradient has cast are kept without a graph
            loss = part()
            value = value + loss.detach()
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient
        linear = torch.stack([(parameter * total).sum() for parameter, total in zip(parameters, totals, strict=True)]).sum()
    return value + (linear - linear.detach())
