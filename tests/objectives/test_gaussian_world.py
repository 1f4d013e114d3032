"""A world in which the best possible denoising loss is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from umm_zoo.batch import Tokens
from umm_zoo.blocks.denoisers import DenoiserHead
from umm_zoo.objectives.gaussian import GaussianNoisePrediction

VARIANCE = 0.25


def optimum(objective: GaussianNoisePrediction, variance: float) -> float:
    """Loss of the best prediction when the condition leaves a Gaussian residual of this variance."""
    bar = objective.process.alphas_bar
    return float((bar * variance / (bar * variance + 1 - bar)).mean())


@pytest.mark.parametrize(
    ("variance", "expected"),
    [(1, 0.495577512582), (0.5, 0.4091), (0.25, 0.32765), (0.1, 0.2339), (0.01, 0.08385), (0.001, 0.02426)],
)
def test_closed_form(variance, expected):
    assert optimum(GaussianNoisePrediction(), variance) == pytest.approx(expected, abs=5e-5)


def world(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, Tokens]:
    """Latents h + r of one channel, and h in a form that survives the head's SiLU."""
    h = torch.randn(rows, 1, generator=generator)
    latents = h + math.sqrt(VARIANCE) * torch.randn(rows, 1, generator=generator)
    return latents[:, :, None, None], Tokens(torch.cat([h, -h], dim=1)[:, None])


def test_best_prediction_reaches_it():
    objective, generator = GaussianNoisePrediction(), torch.Generator().manual_seed(0)
    latents, condition = world(20000, generator)
    bars = torch.from_numpy(objective.process.alphas_bar).float()

    def best(noisy: torch.Tensor, t: torch.Tensor, condition: Tokens) -> torch.Tensor:
        bar = bars[t][:, None, None, None]
        surprise = noisy - bar.sqrt() * condition.values[:, :, :1, None]
        return (1 - bar).sqrt() * surprise / (bar * VARIANCE + 1 - bar)

    losses = objective.losses(best, latents, condition, generator)
    assert float(losses.mean()) == pytest.approx(0.32765, abs=4 * float(losses.std()) / math.sqrt(losses.numel()))


@pytest.mark.long
def test_trained_head_reaches_it_and_not_less():
    torch.manual_seed(0)
    objective, generator = GaussianNoisePrediction(), torch.Generator().manual_seed(1)
    head = DenoiserHead(condition_dim=2, grid=1, channels=1, width=64, depth=3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.0)
    steps = 3000
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective.losses(head, *world(256, generator), generator).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses = objective.losses(head, *world(20000, generator), generator)
    error = float(losses.std()) / math.sqrt(losses.numel())
    assert 0.32765 - 4 * error < float(losses.mean()) < 1.05 * 0.32765
