"""Every loader on the folder of another model, as ``fit --check`` calls it: told in one line from a few hundred bytes of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, LlamaConfig, T5Config

from tests.tiny_configs import codec
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.deit import DeiT3Features
from umm_zoo.backbones.features import CLIPFeatures, CLIPVisionFeatures, DINOv2Features, DINOv3Features, SigLIPFeatures
from umm_zoo.backbones.janus import Janus
from umm_zoo.backbones.janus_vq import JanusVQ
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.pretrained_vlm import PretrainedVLM
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.text_encoder import TextEncoder

WRONG: dict[str, dict[str, Any]] = {
    "bert": {"config.json": {"model_type": "bert"}},
    "paligemma": {
        "config.json": {"model_type": "paligemma", "text_config": {}, "vision_config": {"model_type": "siglip_vision_model"}}
    },
    "llava_next": {"config.json": {"model_type": "llava_next", "vision_config": {"model_type": "clip_vision_model"}}},
    "codec": {"config.json": {"_class_name": "AutoencoderTiny"}},
    "pipeline": {"model_index.json": {"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}},
    "adapter": {"adapter_config.json": {"base_model_name_or_path": "some/model"}},
}
TOWER = {"model_type": "clip_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
SPEAKER = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BOTH = {"vision_config": TOWER, "text_config": SPEAKER}
LOADERS: dict[str, Callable[[str], Any]] = {
    "LLaVA": lambda folder: LlavaBackbone.from_pretrained(folder, config=BOTH),
    "LLaVA's tower": lambda folder: LlavaBackbone.from_parts(folder, SPEAKER),
    "LLaVA's tower, stated": lambda folder: LlavaBackbone.from_parts(folder, SPEAKER, {"vision_config": TOWER}),
    "LLaVA's language model": lambda folder: LlavaBackbone.from_parts(TOWER, folder),
    "LLaVA's language model, stated": lambda folder: LlavaBackbone.from_parts(TOWER, folder, {"text_config": SPEAKER}),
    "Janus": lambda folder: Janus.from_pretrained(folder, config={}),
    "Janus's VQ": lambda folder: JanusVQ.from_pretrained(folder, config={"embed_dim": 4}),
    "Qwen2.5-VL": lambda folder: Qwen25VL.from_pretrained(folder, config={}),
    "any VLM": lambda folder: PretrainedVLM.from_pretrained(folder, config={"model_type": "qwen2_vl"}),
    "T5": lambda folder: TextEncoder.from_pretrained(folder, config={}),
    "KL": lambda folder: KLCodec.from_pretrained(folder, config=codec(4)),
    **{
        kind.__name__: lambda folder, kind=kind: kind.from_pretrained(folder, config={})  # type: ignore[misc]
        for kind in (CLIPFeatures, CLIPVisionFeatures, SigLIPFeatures, DINOv2Features, DINOv3Features, DeiT3Features)
    },
}


def written(folder: Path, files: dict[str, Any]) -> str:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("name", LOADERS)
def test_another_model_is_told_before_anything_is_built(name: str, tmp_path: Path) -> None:
    for kind, files in WRONG.items():
        if (name, kind) in (("KL", "adapter"), ("any VLM", "llava_next")):
            continue  # diffusers knows no adapters; the other is one
        folder = written(tmp_path / kind, files)
        with torch.device("meta"), pytest.raises(ValueError, match=f"{re.escape(folder)}: found [^\n]*, expected [^\n]*$"):
            LOADERS[name](folder)


def test_a_stated_part_is_compared_with_its_folder(tmp_path: Path) -> None:
    tower = written(tmp_path / "tower", {"config.json": CLIPConfig().to_dict()})
    with torch.device("meta"), pytest.raises(ValueError, match=r"config.vision_config.hidden_size: found 16, expected 768 as in"):
        LlavaBackbone.from_parts(tower, SPEAKER, {"vision_config": TOWER})
    speaker = written(tmp_path / "speaker", {"config.json": LlamaConfig(num_hidden_layers=3).to_dict()})
    stated = {"model_type": "llama", "num_hidden_layers": 2}
    with torch.device("meta"), pytest.raises(ValueError, match=r"config.text_config.num_hidden_layers: found 2, expected 3 as in"):
        LlavaBackbone.from_parts(TOWER, speaker, {"text_config": stated})


def test_what_looks_both_ways_is_no_language_model(tmp_path: Path) -> None:
    """The library also makes a "causal" language model of BERT."""
    folder = written(tmp_path / "bert", WRONG["bert"])
    with pytest.raises(ValueError, match=r"language_model: .* found a model of type 'bert', expected a decoder"):
        LlavaBackbone.from_parts(TOWER, folder)


def test_a_text_encoder_is_checked_without_its_weights(tmp_path: Path) -> None:
    config = T5Config(d_model=16, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=1024)
    folder = written(tmp_path / "t5", {"config.json": config.to_dict()})
    with torch.device("meta"):
        assert TextEncoder.from_pretrained(folder).width == 16
