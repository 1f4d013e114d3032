"""Codecs of the library beside KL and DC: their latents and images against the library's own, their files, what they refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from tests.backbones.test_codecs import DC, KL
from tests.tiny_configs import codec
from umm_zoo.backbones.codecs import DCCodec, KLCodec, LibraryCodec, TinyCodec
from umm_zoo.backbones.normed_codecs import Flux2Codec, QwenImageCodec, RAECodec
from umm_zoo.errors import UserError

TINY = {
    "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1], "latent_channels": 5, "scaling_factor": 1.5, "shift_factor": 0.25,
}  # fmt: skip
RAE = {
    "encoder_type": "dinov2", "encoder_hidden_size": 64, "encoder_patch_size": 14, "encoder_num_hidden_layers": 1,
    "encoder_input_size": 42, "patch_size": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16, "scaling_factor": 0.5, "latents_mean": [[[0.3]]],
    "latents_std": [[[2.0]]],
}  # fmt: skip
QWEN = {
    "base_dim": 8, "z_dim": 3, "dim_mult": [1, 1], "temperal_downsample": [False], "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3], "latents_std": [1.5, 0.5, 2.0],
}  # fmt: skip
#: By name: class, configuration, channels, factor, size of an image.
CODECS: dict[str, tuple[type[LibraryCodec], dict[str, Any], int, int, tuple[int, int]]] = {
    "KL": (KLCodec, KL, 5, 2, (8, 12)),
    "DC": (DCCodec, DC, 4, 4, (8, 12)),
    "Tiny": (TinyCodec, TINY, 5, 2, (8, 12)),
    "RAE": (RAECodec, RAE, 64, 4, (12, 12)),
    "FLUX.2": (Flux2Codec, codec(2), 8, 4, (8, 12)),
    "Qwen-Image": (QwenImageCodec, QWEN, 3, 2, (8, 12)),
}
every_codec = pytest.mark.parametrize("name", CODECS)


def codec_of(name: str) -> Any:
    torch.manual_seed(0)
    made: Any = CODECS[name][0].from_config(CODECS[name][1]).eval()
    if name == "FLUX.2":
        made.model.bn.running_mean.normal_()
        made.model.bn.running_var.uniform_(0.5, 2)
    return made


def images_of(name: str) -> torch.Tensor:
    return torch.rand(2, 3, *CODECS[name][4], generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
@every_codec
def test_latents_and_images_are_those_of_the_librarys_pipelines(name: str) -> None:
    made, images, (_, _, channels, factor, (height, width)) = codec_of(name), images_of(name), CODECS[name]
    latents, model = made.encode(images), made.model
    assert latents.shape == (2, channels, height // factor, width // factor)
    assert (made.latent_channels, made.downsampling) == (channels, factor)
    if name == "KL":
        expected, back = (model.encode(images).latent_dist.mean - 0.1159) * 0.3611, model.decode(latents / 0.3611 + 0.1159).sample
    elif name == "DC":
        expected, back = model.encode(images).latent * 0.41407, model.decode(latents / 0.41407).sample
    elif name == "Tiny":
        expected, back = (model.encode(images).latents - 0.25) * 1.5, model.decode(latents / 1.5 + 0.25).sample
    elif name == "RAE":
        expected, back = model.encode(images / 2 + 0.5).latent, model.decode(latents).sample * 2 - 1
    elif name == "FLUX.2":
        pipeline = diffusers.Flux2Pipeline(None, model, None, None, None)
        expected = pipeline._encode_vae_image(images, None)
        mean, std = (value.view(1, -1, 1, 1) for value in (model.bn.running_mean, (model.bn.running_var + 1e-4).sqrt()))
        back = model.decode(pipeline._unpatchify_latents(latents * std + mean)).sample
    else:
        mean, std = (torch.tensor(QWEN[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        expected = ((model.encode(images[:, :, None]).latent_dist.mean - mean) / std)[:, :, 0]
        back = model.decode(latents[:, :, None] * std + mean).sample[:, :, 0]
    assert_close(latents, expected, atol=1e-5, rtol=1e-4)
    assert_close(made.decode(latents), back, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@every_codec
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    made, images = codec_of(name), images_of(name)
    made.save(tmp_path)
    again: Any = type(made).from_pretrained(tmp_path)
    assert torch.equal(again.encode(images), made.encode(images))
    library = made.kind.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, library[key]) for key, value in made.model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["FLUX.2", "Qwen-Image"])
def test_a_draw_has_the_normed_deviation(name: str) -> None:
    made, images = codec_of(name), images_of(name)
    mean, log_variance = made.posterior(images)
    draws = torch.stack([made.encode(images, sample=True) for _ in range(60)])
    assert_close(((draws - mean) / (log_variance / 2).exp()).std(), torch.tensor(1.0), atol=0.05, rtol=0)
    raw = made.model.encode(images if name == "FLUX.2" else images[:, :, None]).latent_dist
    if name == "Qwen-Image":
        assert_close((log_variance / 2).exp() * torch.tensor([1.5, 0.5, 2.0]).view(1, 3, 1, 1), raw.std[:, :, 0])


def test_rae_makes_squares_of_one_size() -> None:
    made = codec_of("RAE")
    with pytest.raises(UserError, match="found images of 12 x 16 px, expected 12 x 12 px, the one size of this RAECodec"):
        made.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(UserError, match="24 x 24 px, expected 12 x 12"):
        made.latent_grid(24, 24)
    with pytest.raises(ValueError, match="reshape_to_2d"):
        RAECodec.from_config({**RAE, "reshape_to_2d": False})


def test_gradient_checkpointing_does_not_shift_tinys_images() -> None:
    plain, images = codec_of("Tiny"), images_of("Tiny")
    torch.manual_seed(0)
    checkpointed = TinyCodec.from_config(TINY, gradient_checkpointing=True).train()
    assert_close(checkpointed.encode(images), plain.encode(images))
    with pytest.raises(ValueError, match="shrinks by 2 and enlarges by 1"):
        TinyCodec.from_config({**TINY, "num_decoder_blocks": [1], "decoder_block_out_channels": [8]})


def test_the_codec_of_the_page_of_parts_is_a_codec(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "experiments" / "parts" / "README.md").read_text(encoding="utf-8")
    words: dict[str, Any] = {}
    exec(re.search(r"```python\n(# taef2.py.*?)```", page, re.S)[1], words)
    made, images = words["TAEF2"](width=8), images_of("KL")[..., :8, :8]
    with torch.no_grad():
        assert made.encode(images).shape == (2, 32, 1, 1) and made.decode(made.encode(images)).shape == images.shape
        assert_close(made.encode(images), made.encoder(images / 2 + 0.5))
    for name in ("encoder", "decoder"):
        save_file(getattr(made, name).state_dict(), tmp_path / f"taef2_{name}.safetensors")
    assert_close(words["TAEF2"](tmp_path, width=8).decode(torch.ones(1, 32, 2, 2)), made.decode(torch.ones(1, 32, 2, 2)))
    published = {f"{place}.{rest}" for place in (11, 12, 13) for rest in ("pool.0.weight", "pool.1.bias", "pool.3.weight")}
    assert published <= made.encoder.state_dict().keys() and "14.bias" in made.encoder.state_dict()
    assert {"3.pool.1.weight", "7.weight", "18.conv.4.bias", "19.bias"} <= made.decoder.state_dict().keys()
