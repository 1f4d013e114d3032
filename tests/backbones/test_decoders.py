"""Every family of decoders: contract, files, padding, bridges; and what one alone has."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_parts import DECODERS, decoder_of, noise_of, texts
from diffusers.schedulers import DDPMScheduler
from torch import Tensor
from torch.testing import assert_close

from tests.methods.bridge_parts import metaquery, requests, wemmu
from tests.tiny_configs import codec
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.discrete_decoders import PixArt, StableDiffusion, StableDiffusionXL
from umm_zoo.backbones.flow_decoders import QwenImage, ZImage
from umm_zoo.backbones.flux import Flux
from umm_zoo.backbones.sana import Sana
from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.batch import Crop, Tokens
from umm_zoo.blocks.connectors import MLPConnector, PositionMLP
from umm_zoo.errors import UserError
from umm_zoo.objectives.discrete import DiscreteDiffusion, DiscreteSchedule
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.guidance import guide, stacked
from umm_zoo.testing import check_block

every_decoder = pytest.mark.parametrize("name", DECODERS)


def times_of(decoder: Any) -> Tensor:
    return torch.tensor([0.25, 0.9]) * (1 if not isinstance(decoder.schedule, DiscreteSchedule) else 1000)


def objective_of(decoder: Any, **settings: Any) -> Any:
    return (DiscreteDiffusion if isinstance(decoder.schedule, DiscreteSchedule) else FlowMatching)(**settings)


@every_decoder
def test_contract(name: str) -> None:
    decoder, noisy = decoder_of(name), noise_of(decoder_of(name))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    ends = ("to_add_out", "txt_mlp") if name == "Qwen-Image" else ()  # of the text, which its last block does not need
    unused = [key for key, _ in decoder.named_parameters() if any(end in key for end in ends)]
    check_block(decoder, (noisy, times_of(decoder), Tokens(texts()[0], mask)), tuple(noisy.shape), unused=unused)
    with pytest.raises(ValueError, match=r"condition: found \[2, 5, 9\], expected \[2, N, 10\]"):
        decoder(noisy, times_of(decoder), Tokens(texts()[0][..., :9]))


@torch.no_grad()
@every_decoder
def test_padding_is_not_seen(name: str) -> None:
    decoder, values = decoder_of(name), texts()[0]
    noisy, time = noise_of(decoder), times_of(decoder)
    expected = decoder(noisy, time, Tokens(values))
    for before, after in ((0, 3), (2, 1)):
        padded = torch.cat([torch.randn(2, before, 10), values, torch.randn(2, after, 10)], dim=1)
        mask = torch.tensor([[False] * before + [True] * 5 + [False] * after] * 2)
        assert_close(decoder(noisy, time, Tokens(padded, mask)), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@every_decoder
def test_saved_and_loaded_it_is_the_same_with_its_scheduler(name: str, tmp_path: Path) -> None:
    decoder = decoder_of(name)
    decoder.save(tmp_path)
    again = type(decoder).from_pretrained(tmp_path, config=DECODERS[name][1])
    if hasattr(decoder, "pooled"):
        again.pooled.copy_(decoder.pooled)
    noisy, condition = noise_of(decoder), Tokens(texts()[0])
    assert torch.equal(again(noisy, times_of(decoder), condition), decoder(noisy, times_of(decoder), condition))
    assert again.schedule.config == decoder.schedule.config
    other: Any = StableDiffusion3 if name == "Sana" else Sana
    with torch.device("meta"), pytest.raises(ValueError, match=r"found weights of a \w+, expected those of a \w+; use umm_zoo"):
        other.from_pretrained(tmp_path, config={})


@every_decoder
@pytest.mark.parametrize("bridge", [metaquery, wemmu])
def test_it_is_a_bridges_decoder(bridge: Any, name: str) -> None:
    decoder = decoder_of(name)
    parts: dict[str, Any] = {"decoder": decoder, "codec": KLCodec.from_config(codec(decoder.latent_channels))}
    connector = PositionMLP(32, 10) if bridge is wemmu else MLPConnector(32, 10)
    if bridge is wemmu:
        parts["detail"] = None
    method = bridge(["connector"], **parts, connector=connector, objective=objective_of(decoder, num_steps=2), image_size=16)
    loss = method.training_losses(requests(0, 0, target=(16, 16)))["loss"]
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.connector.parameters() if parameter.ndim > 1)
    images = method.sample(["red", "a blue circle"], seed=2)
    assert images.shape == (2, 3, 16, 16)
    assert_close(method.sample(["a blue circle"], seed=3), images[1:], atol=1e-3, rtol=1e-3)


def test_an_objective_of_another_kind_is_refused_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^objective: found FlowMatching for .* PNDMScheduler .*'epsilon', expected a .*DiscreteDiff"
    ):
        FlowMatching().match(decoder_of("SD 1.5").schedule)
    with pytest.raises(UserError, match=r"found DiscreteDiffusion for .* FlowMatchEuler\w+, expected a umm_zoo.*FlowMatching"):
        DiscreteDiffusion().match(decoder_of("FLUX.1 dev").schedule)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "'EDMEulerScheduler', expected a scheduler of diffusers with discrete steps"),
        ({"_class_name": None}, "'None', expected a scheduler"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction', expected 'epsilon' or"),
        ({"beta_schedule": "round"}, "expected settings that make a scheduler"),
    ],
)
def test_an_unfit_scheduler_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DiscreteDiffusion().match(DiscreteSchedule({**DiscreteSchedule.first, **change}))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_the_librarys_training_scripts(prediction: str) -> None:
    config = {**DiscreteSchedule.first, "prediction_type": prediction}
    objective = DiscreteDiffusion(schedule=DiscreteSchedule(config))
    latents, noise, index = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 412, 999])

    def network(noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        return 0.5 * noisy + time[:, None, None, None] / 1000

    found = objective.losses_at(network, latents, Tokens(torch.zeros(3, 1, 1)), index, noise)
    library = DDPMScheduler.from_config(config)
    noisy = library.add_noise(latents, noise, index)
    target = {"epsilon": noise, "v_prediction": library.get_velocity(latents, noise, index), "sample": latents}[prediction]
    assert_close(found, (0.5 * noisy + index[:, None, None, None] / 1000 - target).square().mean(dim=(1, 2, 3)))
    a = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[index][:, None, None, None]  # by hand
    assert_close(noisy, a.sqrt() * latents + (1 - a).sqrt() * noise, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_another_sampler_keeps_rows_apart(sampler: str) -> None:
    decoder, condition = decoder_of("SD 1.5"), Tokens(texts()[0])
    objective, noise = DiscreteDiffusion(3, sampler), noise_of(decoder)
    objective.match(decoder.schedule)
    both = objective.sample(decoder, noise.shape, condition, noise=noise)
    alone = objective.sample(decoder, (1, *noise.shape[1:]), condition.select([1]), noise=noise[1:])
    assert_close(alone, both[1:], atol=1e-4, rtol=1e-4)


CROPS = [Crop((40, 30), (20, 15), (2, 0), (16, 8)), None]
SIZES = torch.tensor([[40.0, 30, 2, 0, 16, 8], [16, 8, 0, 0, 16, 8]])


@torch.no_grad()
def test_sdxl_is_told_what_the_loader_cut() -> None:
    decoder = decoder_of("SDXL")
    decoder.pixels_per_cell = 2
    noisy, time, values = noise_of(decoder), times_of(decoder), texts()[0]
    told = {"text_embeds": decoder.pooled.expand(2, -1), "time_ids": SIZES}
    expected = decoder.model(noisy, time, values, added_cond_kwargs=told).sample
    assert_close(decoder(noisy, time, Tokens(values, crops=CROPS)), expected)
    both = stacked([Tokens(values), Tokens(values, crops=CROPS)])
    assert both.crops == [None, None, *CROPS] and both.select([2]).crops == CROPS[:1]


@torch.no_grad()
def test_pixart_is_told_the_original_and_the_ratio() -> None:
    decoder = decoder_of("PixArt-alpha")
    decoder.pixels_per_cell = 2
    noisy, time, values = noise_of(decoder), times_of(decoder), texts()[0]
    told = {"resolution": SIZES[:, :2], "aspect_ratio": torch.tensor([[2.0], [2.0]])}
    expected = decoder.model(noisy, values, time, added_cond_kwargs=told).sample[:, :4]
    assert_close(decoder(noisy, time, Tokens(values, crops=CROPS)), expected)


def test_a_bridge_hands_the_crops_on() -> None:
    decoder, seen = decoder_of("SDXL"), []
    decoder.register_forward_pre_hook(lambda module, given: seen.append(given[2].crops))
    parts: dict[str, Any] = {"decoder": decoder, "codec": KLCodec.from_config(codec(4)), "connector": MLPConnector(32, 10)}
    method = metaquery(**parts, objective=DiscreteDiffusion(2), image_size=16)
    batch = replace(requests(0, 0, target=(16, 16)), crops=CROPS)
    method.training_losses(batch)
    assert seen == [CROPS] and decoder.pixels_per_cell == 2


@pytest.mark.parametrize(
    ("kind", "name", "change", "words"),
    [
        (StableDiffusion, "SDXL", {}, "told sizes .*StableDiffusionXL reads that one"),
        (StableDiffusionXL, "SD 1.5", {}, "addition_embed_type None, expected 'text_time'; .*StableDiffusion reads"),
        (StableDiffusion, "SD 1.5", {"in_channels": 9}, "in_channels 9 and out_channels 4 .inpainting"),
        (StableDiffusion, "SD 1.5", {"time_cond_proj_dim": 4}, "time_cond_proj_dim 4"),
        (StableDiffusion, "SD 1.5", {"cross_attention_dim": [10, 12]}, r"cross_attention_dim \[10, 12\], expected one width"),
        (StableDiffusionXL, "SDXL", {"time_cond_proj_dim": 4}, "time_cond_proj_dim 4"),
        (
            StableDiffusionXL,
            "SDXL",
            {"projection_class_embeddings_input_dim": 2560, "addition_time_embed_dim": 256, "cross_attention_dim": 1280},
            "SDXL's refiner, .*, expected the base",
        ),
        (Flux, "FLUX.1 dev", {"in_channels": 24, "out_channels": 16}, "in_channels 24 and out_channels 16 .FLUX.1-Fill"),
        (StableDiffusion3, "SD 3", {"in_channels": 9}, "in_channels 9 and out_channels 4"),
        (Sana, "Sana", {"guidance_embeds": True}, "guidance_embeds"),
        (ZImage, "Z-Image", {"siglip_feat_dim": 8}, "siglip_feat_dim 8"),
        (QwenImage, "Qwen-Image", {"zero_cond_t": True}, "zero_cond_t"),
        (PixArt, "PixArt-Sigma", {"norm_type": "ada_norm_zero"}, "norm_type 'ada_norm_zero' .DiT"),
    ],
)
def test_relatives_that_need_more_are_told_by_their_config_alone(
    kind: Any, name: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """``fit --check`` builds on the meta device what the experiment states, and looks into the folder first."""
    fit = next(config for own, config, _ in DECODERS.values() if own is kind)
    defaults = {key: value.default for key, value in list(inspect.signature(kind.kind.__init__).parameters.items())[1:]}
    stored = {"_class_name": kind.kind.__name__, **defaults, **DECODERS[name][1], **change}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for stated in (None, fit):
        with torch.device("meta"), pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: {kind.__name__}: .*{words}"):
            kind.from_pretrained(tmp_path, config=stated)
    with torch.device("meta"), pytest.raises(ValueError, match=r"\w"):
        kind.from_config({**DECODERS[name][1], **change})


def test_the_pipeline_of_a_refiner_says_so(tmp_path: Path) -> None:
    decoder_of("SDXL").save(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text(json.dumps({"requires_aesthetics_score": True}))
    for source, subfolder in ((tmp_path, "unet"), (tmp_path / "unet", None)):
        with pytest.raises(ValueError, match="found SDXL's refiner"):
            StableDiffusionXL.from_pretrained(source, subfolder=subfolder)


def test_a_stated_config_is_compared_with_the_stored_one_before_the_weights(tmp_path: Path) -> None:
    decoder_of("SD 1.5").save(tmp_path)
    with torch.device("meta"), pytest.raises(ValueError, match=r"config.cross_attention_dim: found 768, expected 10 as in"):
        StableDiffusion.from_pretrained(tmp_path, config={"cross_attention_dim": 768})


@torch.no_grad()
def test_dev_is_told_its_guidance() -> None:
    dev, noise = decoder_of("FLUX.1 dev"), noise_of(decoder_of("FLUX.1 dev"))
    made = [Flux(dev.model, dev.pooled, guidance=scale)(noise, times_of(dev), Tokens(texts()[0])) for scale in (1.0, 3.5)]
    assert (made[0] - made[1]).abs().max() > 1e-3
    assert Flux.from_config(DECODERS["FLUX.1 dev"][1], guidance=2.0).guidance == 2.0


def test_a_folder_of_before_the_networks_own_name_is_read(tmp_path: Path) -> None:
    decoder = decoder_of("PixArt-Sigma")
    decoder.save(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["interpolation_scale"], written["use_additional_conditions"]
    written |= {"_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0.dev0", "double_self_attention": False}
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = PixArt.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in decoder.state_dict().items())


def test_a_constant_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Flux.pooled: found \[5\], expected \[6\]"):
        Flux(decoder_of("FLUX.1 dev").model, torch.zeros(5))


def test_a_pipeline_without_text_encoders_gives_no_constant(tmp_path: Path) -> None:
    decoder_of("SDXL").save(tmp_path)
    with pytest.raises(
        (ValueError, OSError), match=r"^found '.*', expected a pipeline with a tokenizer_2 and its text_encoder_2 .*$"
    ):
        StableDiffusionXL.from_pretrained(tmp_path, pooled_from=tmp_path)


@torch.no_grad()
def test_guidance_and_a_wide_condition_go_together() -> None:
    """Branches of unequal lengths are padded and masked: as if each ran alone."""
    decoder = decoder_of("FLUX.1 dev")
    objective, noise = FlowMatching(num_steps=2), noise_of(decoder)
    objective.match(decoder.schedule)
    short, long = (Tokens(values) for values in (texts()[0][:, :3], texts()[1]))
    found = objective.sample(decoder, noise.shape, guide(short, long, 2.0), noise=noise)

    def alone(x: Tensor, t: Tensor, condition: Tokens) -> Tensor:
        return 2 * decoder(x, t, long) - decoder(x, t, short)

    assert_close(found, objective.sample(alone, noise.shape, long, noise=noise), atol=1e-4, rtol=1e-4)
