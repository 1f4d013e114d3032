import math

import pytest
import torch
from values_over_ranks import scored

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.batch import Batch, Grid
from umm_zoo.metrics.frechet import FrechetDistance
from umm_zoo.outputs import Outputs


class Means(FeatureEncoder):
    """Two numbers per image: the mean of its red and of its green channel."""

    width, token_width, num_layers, grid, image_size = 2, 1, 1, Grid(1, 1), 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))[:, :2]

    def tokens(self, images: torch.Tensor, layer: int = -1) -> torch.Tensor:
        return self(images)[:, None]


def images(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, torch.zeros(len(values), 1)], dim=1)[:, :, None, None].expand(-1, -1, 4, 4)


def batch(values: torch.Tensor) -> Batch:
    return Batch([str(i) for i in range(len(values))], [[] for _ in values], targets=images(values))


def test_it_is_the_distance_of_two_gaussians() -> None:
    """Equal covariances up to a factor of four on one axis: |shift|^2 + (2 s - s)^2."""
    true = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    true = true - true.mean(dim=0)
    true = true @ torch.linalg.inv(torch.linalg.cholesky(true.T.cov())).T * 0.1  # covariance 0.01 times the identity
    made = true * torch.tensor([2.0, 1.0]) + torch.tensor([0.3, 0.0])
    first, second = ((Outputs(generated=images(made[part])), batch(true[part])) for part in (slice(20), slice(20, None)))
    assert scored(FrechetDistance(Means()), first, second)[""] == pytest.approx(0.3**2 + 0.1**2, rel=1e-3)


def test_without_images_it_is_not_a_number() -> None:
    assert math.isnan(scored(FrechetDistance(Means()), (Outputs(), batch(torch.zeros(3, 2))))[""])
