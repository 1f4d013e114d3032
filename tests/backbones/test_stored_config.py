"""Configurations beside weights: what they leave open is refused, filled in by the experiment, or changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backbones.test_codecs import DC, KL
from tests.backbones.test_features import VISION
from tests.backbones.test_sana import TINY as SANA
from tests.backbones.test_sd3 import CONFIG as SD3
from tests.backbones.vlm_parts import CONVERSATIONS, COUNTS, LLAVA, QWEN, random_images
from umm_zoo.backbones.codecs import DCCodec, KLCodec
from umm_zoo.backbones.features import CLIPFeatures, CLIPVisionFeatures, DINOv2Features, DINOv3Features, SigLIPFeatures
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.sana import Sana
from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.backbones.text_encoder import TextEncoder
from umm_zoo.batch import Tokens

# No value is the library's default, so that a key that is left out shows.
NORM = {"hidden_act": "relu", "layer_norm_eps": 0.01}
TOWER = {**VISION, **NORM}
TEXT = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, **NORM}
TEXT |= {"max_position_embeddings": 12}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 3, "relative_attention_num_buckets": 8}
T5 |= {"relative_attention_max_distance": 4, "layer_norm_epsilon": 0.01}
LLAMA = {**LLAVA["text_config"], "rms_norm_eps": 0.01, "hidden_act": "relu", "rope_theta": 5.0}
KINDS: dict[Any, dict[str, Any]] = {
    KLCodec: {**KL, "act_fn": "relu", "mid_block_add_attention": False},
    DCCodec: {**DC, "decoder_conv_act_fn": "silu"},
    Sana: {**SANA, "timestep_scale": 0.5, "norm_eps": 0.1, "interpolation_scale": 2.0, "qk_norm": "rms_norm_across_heads"},
    StableDiffusion3: SD3,
    CLIPVisionFeatures: TOWER,
    CLIPFeatures: {"text_config": TEXT, "vision_config": TOWER, "projection_dim": 8},
    SigLIPFeatures: {"text_config": {**TEXT, "projection_size": 16}, "vision_config": TOWER},
    DINOv2Features: {**{key: value for key, value in TOWER.items() if key != "intermediate_size"}, "mlp_ratio": 2},
    DINOv3Features: {**TOWER, "rope_theta": 5.0, "num_register_tokens": 2},
    TextEncoder: T5,
    LlavaBackbone: {"vision_config": {**LLAVA["vision_config"], **NORM}, "text_config": LLAMA, "projector_hidden_act": "relu"},
    Qwen25VL: {**QWEN, "text_config": {**QWEN["text_config"], "rms_norm_eps": 0.01, "hidden_act": "relu"}},
}


def saved(kind: Any, folder: Path) -> dict[str, Any]:
    """Random weights that are far from zero, in a folder; the stored configuration."""
    torch.manual_seed(0)
    built = kind.from_config(KINDS[kind])
    for parameter in built.parameters():
        torch.nn.init.normal_(
            parameter, 0.0 if parameter.ndim > 1 else 0.5, (parameter[0].numel() if parameter.ndim else 1) ** -0.5
        )
    built.save(folder) if hasattr(built, "save") else built.model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def output(model: Any) -> Tensor:
    """Everything that a model is asked for, as one vector."""
    model.eval()
    g = torch.Generator().manual_seed(0)
    if isinstance(model, LibraryVLM):
        made = model(model.embed(CONVERSATIONS, random_images(model), COUNTS))
        return torch.cat([made.hidden.flatten(), made.nll])
    if isinstance(model, TextEncoder):
        return model(["a red circle is left of a blue one"]).values.flatten()
    if isinstance(model, ImageDecoder):
        noisy = torch.randn(2, model.latent_channels, 4, 6, generator=g)
        return model(noisy, torch.rand(2, generator=g), Tokens(torch.randn(2, 3, model.condition_dim, generator=g))).flatten()
    images = torch.rand(2, 3, 16, 16, generator=g) * 2 - 1
    if isinstance(model, LatentCodec):
        latents = model.encode(images)
        return torch.cat([latents.flatten(), model.decode(latents).flatten()])
    texts = model.encode_text(["a red circle"]).flatten() if hasattr(model, "encode_text") else torch.zeros(0)
    return torch.cat([model(images).flatten(), model.tokens(images).flatten(), texts])


def keys(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from keys(value, (*above, key))


def without(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return changed


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_key_that_is_left_out_is_refused_or_changes_nothing(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = saved(kind, tmp_path)
    whole, refused = output(kind.from_pretrained(str(tmp_path))), 0
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *_, **__: self)  # of the library's own sizes, for weights not there
    for path in keys(stored):
        (tmp_path / "config.json").write_text(json.dumps(without(stored, path)))
        try:
            found = output(kind.from_pretrained(str(tmp_path)))
        except ValueError:
            refused += 1
            continue
        torch.testing.assert_close(found, whole, msg=f"{kind.__name__} without {'.'.join(path)} is another model")
    assert refused >= 5


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (KLCodec, ("shift_factor",)),
        (Sana, ("timestep_scale",)),
        (CLIPFeatures, ("text_config", "hidden_act")),
        (TextEncoder, ("layer_norm_epsilon",)),
        (LlavaBackbone, ("text_config", "rms_norm_eps")),
        (Qwen25VL, ("text_config", "rms_norm_eps")),
    ],
    ids=str,
)
def test_the_experiment_fills_in_what_is_left_out(kind: Any, path: tuple[str, ...], tmp_path: Path) -> None:
    stored = saved(kind, tmp_path)
    whole = output(kind.from_pretrained(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(without(stored, path)))
    with pytest.raises(ValueError, match=rf"config.json: found no '{'.'.join(path)}'.*state it under config:"):
        kind.from_pretrained(str(tmp_path))
    torch.testing.assert_close(output(kind.from_pretrained(str(tmp_path), config=KINDS[kind])), whole)


def test_a_file_older_than_a_key_means_what_the_network_did_then(tmp_path: Path) -> None:
    """Stable Diffusion 1's own file is of 0.6 and has no scaling_factor: the library's default is its release's."""
    torch.manual_seed(0)
    KLCodec.from_config(
        {**KL, "scaling_factor": 0.5, "shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True}
    ).save(tmp_path)
    file = tmp_path / "config.json"
    young = ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "latents_mean")
    stored = {key: value for key, value in json.loads(file.read_text()).items() if key not in young}
    file.write_text(json.dumps({**stored, "_diffusers_version": "0.6.0"}))
    assert KLCodec.from_pretrained(tmp_path).scaling == pytest.approx(0.18215)
    file.write_text(json.dumps({**stored, "_diffusers_version": "0.30.0"}))
    with pytest.raises(ValueError, match="found no 'scaling_factor', 'shift_factor'"):
        KLCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize(("kind", "mark"), [(KLCodec, "_diffusers_version"), (CLIPVisionFeatures, "transformers_version")])
def test_keys_of_a_newer_library_are_named(kind: Any, mark: str, tmp_path: Path) -> None:
    stored = saved(kind, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**stored, "gated_norm": True, mark: "99.1.0"}))
    with pytest.raises(ValueError, match=r"found 'gated_norm', written by .* 99\.1\.0.*install a newer"):
        kind.from_pretrained(str(tmp_path))


def test_keys_that_nobody_reads_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stored = saved(KLCodec, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**stored, "gated_norm": True}))
    KLCodec.from_pretrained(tmp_path)
    assert "does not read 'gated_norm'" in capfd.readouterr().err


#: What published files say of the parts that matter (https://huggingface.co, config.json of each).
RELEASES = [
    {  # llava-hf/llava-1.5-7b-hf: its inner parts leave out what was the library's default
        "model_type": "llava",
        "transformers_version": "4.36.0.dev0",
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14},
    },
    {  # google/siglip-so400m-patch14-384
        "model_type": "siglip",
        "transformers_version": "4.37.0.dev0",
        "text_config": {"model_type": "siglip_text_model", "hidden_size": 1152, "num_attention_heads": 16},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 14},
    },
    {  # lmsys/vicuna-7b-v1.5, from before rope_theta had a name
        "model_type": "llama",
        "transformers_version": "4.31.0",
        "hidden_act": "silu",
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
    },
    {  # Qwen/Qwen2.5-VL-3B-Instruct: the language model's keys stand beside the others
        "model_type": "qwen2_5_vl",
        "transformers_version": "4.41.2",
        "hidden_act": "silu",
        "num_attention_heads": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vision_config": {"hidden_size": 1280, "in_chans": 3},
    },
]


@pytest.mark.parametrize("stored", RELEASES, ids=lambda stored: stored["model_type"])
def test_published_files_say_enough(stored: dict[str, Any]) -> None:
    from umm_zoo.backbones.stored_config import complete_transformers

    assert not complete_transformers("release", copy.deepcopy(stored), {})
