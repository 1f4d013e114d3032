"""Latents of release decoders against the library's own pipelines: same weights, noise and condition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.testing import assert_close

from tests.backbones.test_codecs import DC, KL
from umm_zoo.backbones.codecs import DCCodec, KLCodec
from umm_zoo.backbones.diffusers_decoder import DiffusersDecoder
from umm_zoo.backbones.sana import Sana
from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.batch import Tokens
from umm_zoo.errors import UserError
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import Branch, guide
from umm_zoo.objectives.schedules import EvenlySpaced
from umm_zoo.objectives.solvers import Euler

SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 10,
    "num_layers": 2,
    "mlp_ratio": 2.0,
}
SD3 = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 6,
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "joint_attention_dim": 10,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 8,
}
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 40, "max_shift": 1.4}
SCHEDULERS = [
    (Sana, {}),
    (Sana, {"flow_shift": 1.0}),
    (Sana, {"flow_shift": 5.5}),
    (Sana, {"flow_shift": 2.0, "solver_order": 1}),
    (Sana, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 4.0}),
    (StableDiffusion3, {}),
    (StableDiffusion3, {"shift": 1.0}),
    (StableDiffusion3, {"shift": 6.0}),
    (StableDiffusion3, DYNAMIC),
    (StableDiffusion3, {**DYNAMIC, "time_shift_type": "linear"}),
    (StableDiffusion3, {**DYNAMIC, "shift_terminal": 0.1}),
    (StableDiffusion3, {"use_karras_sigmas": True}),
]


def decoder_of(kind: type[DiffusersDecoder], config: dict[str, Any]) -> DiffusersDecoder:
    torch.manual_seed(0)
    decoder = kind.from_config(SANA if kind is Sana else SD3).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    if config:
        decoder.scheduler = config if "_class_name" in config else {**kind.release_scheduler, **config}
    return decoder


def pipeline_latents(decoder: DiffusersDecoder, noise: Tensor, texts: list[Tensor], steps: int, guidance: float) -> Tensor:
    """The library's own: its pipeline around the same network, its scheduler from the same config."""
    config = dict(decoder.scheduler or decoder.release_scheduler)
    kinds = {kind.__name__: kind for kind in (DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler)}
    scheduler = kinds[config["_class_name"]].from_config(config)
    settings: dict[str, Any] = {"prompt_embeds": texts[1], "negative_prompt_embeds": texts[0]}
    if isinstance(decoder, Sana):
        vae = DCCodec.from_config(DC).model  # nothing but its factor is looked at
        pipeline = SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=decoder.model, scheduler=scheduler)
        ones = torch.ones(texts[0].shape[:2])
        settings |= {"negative_prompt": None, "prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
        settings |= {"use_resolution_binning": False}
    else:
        vae = KLCodec.from_config(KL).model
        names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
        pipeline = StableDiffusion3Pipeline(decoder.model, scheduler, vae, **dict.fromkeys(names))
        pooled = decoder.pooled.expand(len(noise), -1)
        settings |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    pipeline.set_progress_bar_config(disable=True)
    height, width = (side * 32 for side in noise.shape[-2:])  # given latents decide
    return pipeline(
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise.clone(),
        output_type="latent",
        **settings,
    ).images


def condition() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(2, 5, 10, generator=g) for _ in range(2)]


def noise_of(seed: int = 3) -> Tensor:
    return torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 40])
@pytest.mark.parametrize(("kind", "config"), SCHEDULERS)
def test_latents_are_the_pipelines(kind: type[DiffusersDecoder], config: dict[str, Any], steps: int, guidance: float) -> None:
    if steps == 1 and "shift_terminal" in config:
        pytest.skip("the library divides by zero")
    decoder, noise, texts = decoder_of(kind, config), noise_of(), condition()
    objective = FlowMatching()
    objective.match(decoder.schedule)
    without, given = (Tokens(values) for values in texts)
    branches = guide(without, given, guidance) if guidance != 1 else [Branch(given, 1.0)]
    found = objective.sample(decoder, (2, 4, 6, 4), branches, noise=noise, num_steps=steps)
    expected = pipeline_latents(decoder, noise, texts, steps, guidance)
    assert (expected - noise).abs().max() > 0.1
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_times_are_those_of_the_schedulers() -> None:
    """SD3's last times and Sana's first, worked out by hand from the shift of 3."""
    last = StableDiffusion3.from_config(SD3).schedule(40, 6, 4).times[-3:]
    assert_close(torch.tensor(last), torch.tensor([0.0810, 0.0089, 0.0]), atol=5e-5, rtol=0)
    times, network_times = Sana.from_config(SANA).schedule(20, 6, 4)
    assert_close(times[:2], [3 * 0.999 / (1 + 2 * 0.999), 3 * 0.94905 / (1 + 2 * 0.94905)], atol=1e-6, rtol=0)
    assert_close(network_times[:2], [0.999, 0.982], atol=1e-6, rtol=0)


@pytest.mark.parametrize("subfolder", ["transformer", None])
def test_a_strangers_pipeline_brings_its_own_scheduler(subfolder: str | None, tmp_path: Path) -> None:
    decoder_of(Sana, {}).model.save_pretrained(tmp_path / "transformer")
    DPMSolverMultistepScheduler(flow_shift=7.0, use_flow_sigmas=True, prediction_type="flow_prediction").save_pretrained(
        tmp_path / "scheduler"
    )
    (tmp_path / "model_index.json").write_text("{}")
    source = tmp_path if subfolder else tmp_path / "transformer"
    decoder = Sana.from_pretrained(source, subfolder=subfolder)
    decoder.save(tmp_path / "alone")
    for made in (decoder, Sana.from_pretrained(tmp_path / "alone")):
        assert_close(made.schedule(2, 6, 4).times[0], 7 * 0.999 / (1 + 6 * 0.999), atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_a_damaged_scheduler_is_named(text: str, tmp_path: Path) -> None:
    decoder_of(Sana, {}).save(tmp_path)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"scheduler_config.json', expected a map of a scheduler's settings"):
        Sana.from_pretrained(tmp_path)


def test_without_a_scheduler_beside_it_a_network_has_that_of_its_first_release(tmp_path: Path) -> None:
    decoder_of(StableDiffusion3, {}).save(tmp_path)
    assert StableDiffusion3.from_pretrained(tmp_path).schedule.config["shift"] == 3.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "DDIMScheduler"}, "_class_name 'DDIMScheduler', expected FlowMatch"),
        ({"solver_type": "heun"}, "solver_type 'heun' of a DPMSolverMultistepScheduler, expected 'midpoint'"),
        ({"prediction_type": "epsilon"}, "prediction_type 'epsilon'"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type 'sde-dpmsolver"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas False"),
        ({"flow_shift": "three"}, "numbers that make times"),
        ({"flow_shift": -3.0}, "expected falling ones"),
        ({"num_train_timesteps": 0}, "numbers that make times"),
        ({"_class_name": None}, "_class_name 'None'"),
    ],
)
def test_a_scheduler_that_steps_in_another_way_is_refused_unless_the_objective_states_its_own(
    change: dict[str, Any], words: str
) -> None:
    decoder = decoder_of(Sana, {**Sana.release_scheduler, **change})
    with pytest.raises(UserError, match=words):
        FlowMatching().match(decoder.schedule)
    stated = FlowMatching(schedule=EvenlySpaced(), solver=Euler())
    stated.match(decoder.schedule)
    assert isinstance(stated.schedule, EvenlySpaced)
