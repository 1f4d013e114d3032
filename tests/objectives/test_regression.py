"""Regression distances and their per-sample means."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from umm_zoo.batch import Tokens
from umm_zoo.objectives.regression import MeanSquaredError, NegativeCosine


def predicting(value):
    return lambda condition: value


CONDITION = Tokens(torch.zeros(2, 4, 3))


def test_squared_error_per_sample():
    target = torch.zeros(2, 3, 2, 2)
    predicted = torch.stack([torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), 2.0)])
    losses = MeanSquaredError().losses(predicting(predicted), target, CONDITION)
    assert_close(losses, torch.tensor([[0.25, 4.0]]))


def test_cosine_is_taken_over_channels_and_ignores_scale():
    target = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).repeat(2, 1, 2, 2)
    angle = math.pi / 3
    predicted = 7 * torch.tensor([math.cos(angle), math.sin(angle)]).reshape(1, 2, 1, 1).repeat(2, 1, 2, 2)
    predicted[1] *= -1
    assert_close(NegativeCosine().losses(predicting(predicted), target, CONDITION), torch.tensor([[0.5, 1.5]]))


def test_loss_is_the_mean_and_sampling_is_the_prediction():
    predicted = torch.randn(2, 3, 2, 2)
    objective = MeanSquaredError()
    assert_close(objective(predicting(predicted), torch.zeros_like(predicted), CONDITION)["loss"], predicted.square().mean())
    assert torch.equal(objective.sample(predicting(predicted), (2, 3, 2, 2), CONDITION), predicted)


def test_other_shape_is_refused():
    with pytest.raises(ValueError, match=r"found a prediction \[2, 3, 2, 2\], expected the target's \[2, 4, 2, 2\]"):
        MeanSquaredError().losses(predicting(torch.zeros(2, 3, 2, 2)), torch.zeros(2, 4, 2, 2), CONDITION)
