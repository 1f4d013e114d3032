"""Codecs that a run has trained, in other experiments: of the run itself, and of what export writes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import write_run
from tiny_configs import llama
from torch.testing import assert_close

from umm_zoo.backbones.diffusion_codec import DiffusionCodec
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.token_codec import TokenCodec
from umm_zoo.backbones.visual_tokenizer import VisualTokenizer
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build
from umm_zoo.experiment.targets import find_target
from umm_zoo.method import Method
from umm_zoo.pretraining.autoencoder import Autoencoder
from umm_zoo.pretraining.epsilon_vae import EpsilonVAE
from umm_zoo.pretraining.tokenizer import Tokenizer
from umm_zoo.release.exporting import Export
from umm_zoo.training.finished_run import load_run

VISION = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BLOCKS = "umm_zoo.blocks"
TOKENIZER: dict[str, Any] = {
    "_target_": "umm_zoo.pretraining.tokenizer.Tokenizer",
    "tokenizer": {
        "_target_": "umm_zoo.backbones.visual_tokenizer.VisualTokenizer",
        "encoder": {
            "_target_": "umm_zoo.backbones.features.CLIPVisionFeatures.from_config",
            "config": {**VISION, "image_size": 12, "patch_size": 4},
        },
        "branches": {
            "pixel": {
                "_target_": "umm_zoo.backbones.visual_tokenizer.Branch",
                "layer": -2,
                "bottleneck": {
                    "_target_": f"{BLOCKS}.bottlenecks.Bottleneck",
                    "down": {"_target_": f"{BLOCKS}.bottlenecks.LinearProjection", "in_dim": 12, "out_dim": 6},
                    "quantizer": {"_target_": f"{BLOCKS}.quantizers.SimVQuantizer", "dim": 6, "size": 20},
                    "up": {"_target_": f"{BLOCKS}.bottlenecks.LinearProjection", "in_dim": 6, "out_dim": 12},
                },
            }
        },
        "decoder": {
            "_target_": f"{BLOCKS}.pixel_decoders.ViTPixelDecoder",
            **{"in_dim": 12, "patch": 4, "width": 12, "depth": 1, "heads": 2},
        },
    },
}
EPSILON: dict[str, Any] = {
    "_target_": "umm_zoo.pretraining.epsilon_vae.EpsilonVAE",
    "codec": {
        "_target_": "umm_zoo.backbones.diffusion_codec.DiffusionCodec",
        "encoder": {
            "_target_": "umm_zoo.backbones.diffusion_codec.ConvEncoder",
            **{"latent_channels": 2, "channels": [8, 8], "layers_per_block": 1, "groups": 4},
        },
        "denoiser": {
            "_target_": "umm_zoo.backbones.diffusion_codec.UNetPixelDenoiser",
            **{"condition_dim": 2, "channels": [8, 8], "layers_per_block": 1, "groups": 4},
        },
        "objective": {"_target_": "umm_zoo.objectives.flow_matching.FlowMatching", "num_steps": 2},
    },
}
KINDS = {"tokenizer": (TOKENIZER, Tokenizer, 12), "epsilon": (EPSILON, EpsilonVAE, 8)}


def finished(folder: Path, name: str) -> Path:
    """A run whose weights, and statistics of the latents, are others than those that its node builds."""
    node, _, side = KINDS[name]
    run = write_run(folder, node, image_size=side)
    file = run / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content["state_dict"] |= {key: v + 0.01 for key, v in content["state_dict"].items() if v.is_floating_point()}
    content["state_dict"] |= {"codec.scaling": torch.tensor(2.5), "codec.shift": torch.tensor(0.25)}
    torch.save(content, file)
    (run / "metrics.json").write_text(json.dumps({"steps": 1, "seconds": 1.0, "metrics": {}, "samples": {}}))
    return run


@pytest.mark.parametrize("name", KINDS)
def test_a_codec_of_a_run_and_of_its_export_is_that_of_the_method(name: str, tmp_path: Path) -> None:
    run, (_, kind, side) = finished(tmp_path / "run", name), KINDS[name]
    card = Export(run).write(tmp_path / "out")
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = Method.load(run).codec
    for codec in (kind.load_codec(run), build(card["load"])):
        assert_close(codec.encode(images), expected.encode(images), rtol=0, atol=0)
        assert_close(codec.decode(codec.encode(images)), expected.decode(expected.encode(images)), rtol=0, atol=0)
        assert float(codec.scaling) == 2.5 and not codec.training


def test_codes_of_an_export_are_those_of_the_run(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "tokenizer")
    Export(run).write(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if file.suffix != ".json") == [
        "README.md",
        "encoder",
        "method.safetensors",
    ]
    images = torch.rand(3, 3, 12, 12) * 2 - 1
    assert torch.equal(Tokenizer.load_codec(tmp_path / "out").codes(images), Tokenizer.load_codec(run).codes(images))


def test_its_encoder_is_a_tower_for_llava(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "tokenizer")
    Export(run).write(tmp_path / "tower", part="encoder")
    model = LlavaBackbone.from_parts(str(tmp_path / "tower"), llama(), {"vision_feature_layer": -2})
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    assert_close(
        model.tower_features(model.normalise(images)), Tokenizer.load_codec(run).encoder.tokens(images, -2), rtol=0, atol=0
    )


def test_slots_know_what_is_loaded() -> None:
    kinds = [find_target(f"{method.__module__}.{method.__name__}.load_codec").kind for method in (Tokenizer, EpsilonVAE)]
    assert kinds == [VisualTokenizer, DiffusionCodec] and issubclass(VisualTokenizer, TokenCodec)


def test_a_checkpoint_of_a_tokenizer_holds_its_statistics(tmp_path: Path) -> None:
    """They stand in none of the parts, and a decoder trained on its latents depends on them."""
    method = build(TOKENIZER)
    method.train_only(["branches", "decoder"])
    checkpoint = {"state_dict": {**method.state_dict(), "codec.scaling": torch.tensor(3.0)}}
    method.on_save_checkpoint(checkpoint)
    assert {"codec.scaling", "codec.shift"} <= set(checkpoint["state_dict"])
    assert not [key for key in checkpoint["state_dict"] if key.startswith("codec.encoder")]


def test_what_is_no_such_codec_is_refused_in_one_line(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "epsilon")
    Export(run).write(tmp_path / "out")
    for load, source, text in (
        (Tokenizer.load_codec, run, r"EpsilonVAE, expected a node of .*VisualTokenizer"),
        (Tokenizer.load_codec, tmp_path / "out", r"DiffusionCodec, expected a node of .*VisualTokenizer"),
        (Tokenizer.load_codec, tmp_path / "nowhere", "no checkpoint"),
        (Tokenizer.load_codec, "umm_zoo:tiny/weights/codec", "no checkpoint"),
        (Method.load, tmp_path / "out", r"DiffusionCodec, expected a node of .*Method"),
    ):
        with pytest.raises(UserError, match=text) as refused:
            load(source)
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(UserError, match="found a codec alone, expected a run, or a whole method"):
        load_run(tmp_path / "out")
    (tmp_path / "out" / "method.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="missing or is not what was written"):
        EpsilonVAE.load_codec(tmp_path / "out")
    state = load_checkpoint(run)
    torch.save({**state, "experiment": {"method": "a codec"}}, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"found 'a codec' \(text\), expected a node of"):
        EpsilonVAE.load_codec(tmp_path / "odd.ckpt")
    state["state_dict"]["codec.scaling"] = torch.zeros(2)
    torch.save(state, run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"'scaling' of \[2\], expected tensors of the codec"):
        Autoencoder.load_codec(run)
