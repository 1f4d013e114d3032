"""Latents of every family of decoders against the library's own pipeline: same weights, noise, condition and scheduler."""

from __future__ import annotations

import pytest
import torch
from decoder_parts import DECODERS, GUIDED, decoder_of, noise_of, pipeline_latents, texts
from torch.testing import assert_close

from umm_zoo.batch import Tokens
from umm_zoo.errors import UserError
from umm_zoo.objectives.discrete import DiscreteDiffusion, DiscreteSchedule, drawn_for
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


SD = DiscreteSchedule.first
SAMPLERS = {
    "HeunDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {"use_karras_sigmas": True},
    "DPMSolverSinglestepScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "PNDMScheduler": {"skip_prk_steps": False},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "trailing"},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "DEISMultistepScheduler": {},
    "SASolverScheduler": {},
    "DDPMScheduler": {"prediction_type": "v_prediction"},
}


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_the_librarys(sampler: str) -> None:
    """Also those that draw noise, from the same generators."""
    decoder, without_and_given = decoder_of("SD 1.5", {**SD, "_class_name": sampler, **SAMPLERS[sampler]}), texts()
    noise = noise_of(decoder)
    branches = guide(*(Tokens(values) for values in without_and_given), 2.5)
    objective = objective_of(decoder, num_steps=4)
    found = objective.sample(decoder, noise.shape, branches, noise=noise)
    rows = drawn_for(objective.known.scheduler("DDPMScheduler"), noise)
    assert_close(found, pipeline_latents(decoder, noise, without_and_given, 4, 2.5, **rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "DDIMInverseScheduler"}, "'DDIMInverseScheduler', expected a scheduler .*from noise to data"),
        ({"_class_name": "RePaintScheduler"}, "a RePaintScheduler that makes no step"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "CogVideoXDDIMScheduler with 1000 steps of noise of its own"),
        ({"_class_name": "PNDMScheduler", "prediction_type": "sample"}, "for a network that predicts 'sample'"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True"),
    ],
)
def test_what_is_sampled_in_another_way_than_trained_is_refused_at_once(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        DiscreteDiffusion().match(DiscreteSchedule({**SD, **change}))


def test_a_sampler_along_other_noise_than_the_release_is_refused() -> None:
    """What the file leaves out is its own class's default: SD's noise for LCM, another for Heun and DDPM."""
    schedule = DiscreteSchedule({"_class_name": "LCMScheduler"})
    assert_close(schedule.training.betas[-1].item(), 0.012)
    with pytest.raises(UserError, match=r"^objective.sampler: found HeunDiscreteScheduler with 1000 steps of noise of its own"):
        DiscreteDiffusion(sampler="HeunDiscreteScheduler").match(schedule)


@torch.no_grad()
def test_z_images_network_is_told_thousandths_whatever_its_scheduler_counts() -> None:
    decoder, without_and_given = (
        decoder_of("Z-Image", {**DECODERS["Z-Image"][0].release_scheduler, "num_train_timesteps": 500}),
        texts(),
    )
    noise = noise_of(decoder)
    branches = guide(*(Tokens(values) for values in without_and_given), 2.5)
    found = objective_of(decoder, num_steps=2).sample(decoder, noise.shape, branches, noise=noise)
    assert_close(found, pipeline_latents(decoder, noise, without_and_given, 2, 2.5), atol=1e-4, rtol=1e-4)


def test_a_flow_shifted_by_its_size_is_not_dpm_solvers() -> None:
    """Sana's pipeline does not tell it the size, SD3's does."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    decoder = decoder_of("SD 3", {**config, "use_dynamic_shifting": True})
    with pytest.raises(UserError, match="use_dynamic_shifting True of a DPMSolverMultistepScheduler, expected False"):
        FlowMatching().match(decoder.schedule)
