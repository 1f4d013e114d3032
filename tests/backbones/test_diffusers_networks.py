"""Networks of diffusers: built, saved, loaded again, refused, and at their public sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.backbones.test_codecs import DC, KL
from tests.backbones.test_sana import TINY as SANA
from tests.backbones.test_sd3 import CONFIG as SD3
from umm_zoo.backbones.codecs import DCCodec, KLCodec
from umm_zoo.backbones.diffusers_loading import DiffusersNetwork
from umm_zoo.backbones.sana import Sana
from umm_zoo.backbones.sd3 import StableDiffusion3

NETWORKS = [(KLCodec, KL), (DCCodec, DC), (Sana, SANA), (StableDiffusion3, SD3)]
every_network = pytest.mark.parametrize(("kind", "config"), NETWORKS)


@every_network
def test_saved_and_loaded_it_is_the_same_bit_for_bit(kind: type[DiffusersNetwork], config: dict[str, Any], tmp_path: Path) -> None:
    made = kind.from_config(config)
    made.save(tmp_path)
    again = kind.from_pretrained(tmp_path, config=config)
    assert again.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in made.state_dict().items())
    library = kind.kind.from_pretrained(tmp_path)
    assert all(torch.equal(value, library.state_dict()[key]) for key, value in made.model.state_dict().items())
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in config} == config  # 0.3611 stays 0.3611


@every_network
def test_what_does_not_fit_is_refused(kind: type[DiffusersNetwork], config: dict[str, Any], tmp_path: Path) -> None:
    kind.from_config(config).save(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.endswith("bias"))
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"1 tensors missing, such as {name}"):
        kind.from_pretrained(tmp_path)
    save_file({**weights, "stranger": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="1 tensors unexpected, such as stranger"):
        kind.from_pretrained(tmp_path)
    save_file(weights, path)
    number = next(key for key, value in config.items() if isinstance(value, int) and not isinstance(value, bool))
    with pytest.raises(ValueError, match=rf"config\.{number}: found 99, expected {config[number]} as in"):
        kind.from_pretrained(tmp_path, config={**config, number: 99})
    with pytest.raises(ValueError, match=f"did you mean '{number}'"):
        kind.from_config({number[:-1]: 4})


KL_LARGE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32}
KL_LARGE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
DC_LARGE = {
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "attention_head_dim": 32,
    "latent_channels": 32,
}
SD3_LARGE = {"sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 38, "attention_head_dim": 64}
SD3_LARGE |= {"num_attention_heads": 38, "joint_attention_dim": 4096, "caption_projection_dim": 2432}
SD3_LARGE |= {"pooled_projection_dim": 2048, "pos_embed_max_size": 192}


def sd3_parameters(d: int = 2432) -> int:
    block = (6 + 6 + 8 + 8 + 8) * d**2 + (6 + 6 + 8 + 5 + 5) * d + 4 * 64  # two modulations, eight projections, two feed-forwards
    last = (6 + 2 + 7 + 8) * d**2 + (6 + 2 + 7 + 5) * d + 4 * 64  # the text ends there
    ends = 65 * d + (256 * d + d**2 + 2 * d) + (2048 * d + d**2 + 2 * d) + 4097 * d + 2 * (d**2 + d) + 64 * (d + 1)
    return 37 * block + last + ends


@pytest.mark.parametrize(
    ("kind", "config", "count", "sizes"),
    [
        # FLUX.1 VAE: public file of 335 MB in float32, https://huggingface.co/black-forest-labs/FLUX.1-dev (vae); SD3's is the same
        (KLCodec, {**KL, **KL_LARGE}, 83_819_683, {"latent_channels": 16, "downsampling": 8}),
        (DCCodec, {**DC, **DC_LARGE}, 312_250_275, {"latent_channels": 32, "downsampling": 32}),  # "312M", arXiv 2410.10733
        (Sana, {}, 1_604_462_752, {"condition_dim": 2304, "latent_channels": 32, "patch": 1}),
        (StableDiffusion3, {**SD3, **SD3_LARGE}, sd3_parameters(), {"condition_dim": 4096, "latent_channels": 16, "patch": 2}),
    ],
)
def test_public_sizes_are_built_without_memory_or_files(
    kind: type[DiffusersNetwork], config: dict[str, Any], count: int, sizes: dict[str, int]
) -> None:
    pipeline = {"pooled_from": "nowhere"} if kind is StableDiffusion3 else {}
    with torch.device("meta"):
        network = kind.from_pretrained("nowhere/nothing", config=config, **pipeline)
    assert sum(p.numel() for p in network.parameters()) == count
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert {name: getattr(network, name) for name in sizes} == sizes


@pytest.mark.parametrize("given", [True, False])
def test_another_network_is_named_with_its_reader_before_anything_is_read(given: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "SanaTransformer2DModel"}')
    with torch.device("meta"), pytest.raises(ValueError, match=r"of a SanaTransformer2DModel, expected .*; use umm_zoo\S+\.Sana$"):
        StableDiffusion3.from_pretrained(tmp_path, config=SD3 if given else None)


def test_a_pipeline_in_the_place_of_its_network_is_named(tmp_path: Path) -> None:
    parts = {
        "_class_name": "SanaPipeline",
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match=r"a whole pipeline \(SanaPipeline\), .*; subfolder: transformer"):
        Sana.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"it has SanaTransformer2DModel in 'transformer'; use \S+\.Sana and AutoencoderDC in"):
        StableDiffusion3.from_pretrained(tmp_path)
