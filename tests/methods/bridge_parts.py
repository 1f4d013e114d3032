"""A bridge small enough for tests: 2 layers of width 32, 4 x 4 tokens per image of 32 px, a codec of factor 2 and 2 channels."""

from __future__ import annotations

from typing import Any

import tiny_configs
import torch
from torch import nn

from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.sana import Sana
from umm_zoo.batch import Batch
from umm_zoo.blocks.connectors import PositionMLP
from umm_zoo.blocks.details import VAEDetail
from umm_zoo.blocks.metaquery_connector import MetaQueryConnector
from umm_zoo.blocks.pathways import ExpertPathway, FrozenPathway
from umm_zoo.blocks.queries import LearnedQueries, NoisyQueries
from umm_zoo.methods.encoded_prompt import EncodedPrompt, encode_prompt
from umm_zoo.methods.metaquery import MetaQuery
from umm_zoo.methods.wemmu import WeMMU
from umm_zoo.objectives.flow_matching import FlowMatching

VLM = tiny_configs.qwen(32, [2, 3, 3], theta=100.0, intermediate_size=40)
CODEC = tiny_configs.codec(2, scaling_factor=0.36, shift_factor=0.1)
SANA = {
    "in_channels": 2,
    "out_channels": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 4,
}


def tiny_vlm() -> Qwen25VL:
    """With weights large enough that a wrong mask or position shows."""
    torch.manual_seed(0)
    vlm = Qwen25VL.from_config(VLM, system_prompt=None)
    for parameter in vlm.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return vlm.eval()


def wemmu(trained: list[str] | None = None, **blocks: Any) -> WeMMU:
    parts: dict[str, Any] = {
        "vlm": tiny_vlm(),
        "queries": NoisyQueries(32),
        "pathway": ExpertPathway(),
        "connector": PositionMLP(32, 12),
        "decoder": Sana.from_config(SANA),
        "codec": KLCodec.from_config(CODEC),
        "objective": FlowMatching(num_steps=2),
        "detail": VAEDetail(2, 32),
        "image_size": 8,
    }
    method = WeMMU(**{**parts, **blocks})
    method.train_only(trained or ["pathway", "connector", "detail"])
    return method


def metaquery(trained: list[str] | None = None, **blocks: Any) -> MetaQuery:
    parts: dict[str, Any] = {
        "vlm": tiny_vlm(),
        "queries": LearnedQueries(32, 5),
        "pathway": FrozenPathway(),
        "connector": MetaQueryConnector(32, 12, 1, 2),
        "decoder": Sana.from_config(SANA),
        "codec": KLCodec.from_config(CODEC),
        "objective": FlowMatching(num_steps=2),
        "image_size": 8,
    }
    method = MetaQuery(**{**parts, **blocks})
    method.train_only(trained or ["queries", "connector", "decoder"])
    return method


def encoded(method: WeMMU | MetaQuery, batch: Batch) -> EncodedPrompt:
    """The requests of a batch as they are, nothing left out."""
    return encode_prompt(method.vlm, method.codec, method.detail, batch)


PROMPTS = {0: "a red circle", 1: "<image>\nMake the circle green.", 2: "<image>\n<image>\nPut the star of the second in the first."}


def requests(*counts: int, seed: int = 1, target: tuple[int, int] = (8, 8)) -> Batch:
    """Rows with so many images each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(sum(counts), 3, 32, 32, generator=generator) * 2 - 1
    return Batch(
        keys=[f"row {i}" for i in range(len(counts))],
        conversations=[[{"role": "user", "text": PROMPTS[count]}] for count in counts],
        images=list(images),
        image_counts=list(counts),
        targets=list(torch.rand(len(counts), 3, *target, generator=generator) * 2 - 1),
    )
