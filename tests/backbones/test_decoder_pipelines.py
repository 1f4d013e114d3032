"""Latents of every family of decoders against the library's own pipeline: same weights, noise, condition and scheduler."""

from __future__ import annotations

import pytest
import torch
from decoder_parts import DECODERS, GUIDED, decoder_of, noise_of, pipeline_latents, texts
from torch.testing import assert_close

from umm_zoo.batch import Tokens
from umm_zoo.objectives.discrete import DiscreteDiffusion, DiscreteSchedule
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import guide


def objective_of(decoder, **settings):
    objective = (DiscreteDiffusion if isinstance(decoder.schedule, DiscreteSchedule) else FlowMatching)(**settings)
    objective.match(decoder.schedule)
    return objective


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_latents_are_the_pipelines(name: str) -> None:
    decoder, without_and_given = decoder_of(name), texts()
    decoder.pixels_per_cell, noise = 2, noise_of(decoder)
    scale = 2.5 if name in GUIDED else 1.0
    branches = guide(*(Tokens(values) for values in without_and_given), scale)
    found = objective_of(decoder).sample(decoder, noise.shape, branches, noise=noise, num_steps=4)
    expected = pipeline_latents(decoder, noise, without_and_given, 4, scale)
    assert (expected - noise).abs().max() > 0.1
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
