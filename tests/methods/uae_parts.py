"""UAE's blocks in sizes that run in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.batch import Batch
from umm_zoo.blocks.connectors import MLPConnector
from umm_zoo.methods.uae.captioner_grpo import GenerationForUnderstanding
from umm_zoo.methods.uae.decoder_grpo import UnderstandingForGeneration
from umm_zoo.methods.uae.pretraining import UAE
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.objectives.flow_grpo import FlowGRPO
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.objectives.solvers import Euler
from umm_zoo.rewards import Reward
from umm_zoo.training.optimization import AdamW

VLM = {
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 1024,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "out_hidden_size": 24,
    },
}
DECODER = {
    "sample_size": 4,
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 4,
}
CODEC = {
    "latent_channels": 4,
    "block_out_channels": [4, 4],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
PROMPT = "<image>\nDescribe the image."


class Redness(Reward):
    """The mean of the red channel."""

    def score(self, candidates: Tensor, batch: Batch) -> Tensor:
        return candidates[:, 0].mean(dim=(1, 2))


def lively(module: nn.Module) -> nn.Module:
    """Weights large enough that what a part does shows in the outputs."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module


def vlm() -> Qwen25VL:
    torch.manual_seed(0)
    return lively(Qwen25VL.from_config(VLM, system_prompt=None))  # type: ignore[return-value]


def renderer(guidance: float = 2.0, **arguments: Any) -> CaptionRenderer:
    torch.manual_seed(1)
    return CaptionRenderer(
        MLPConnector(24, 20, 28),
        lively(StableDiffusion3.from_config(DECODER)),  # type: ignore[arg-type]
        KLCodec.from_config(CODEC),
        FlowMatching(num_steps=3, solver=Euler()),
        guidance=guidance,
        image_size=8,
        **arguments,
    )


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batch(count: int = 2, caption: str = "top left: a small red circle") -> Batch:
    rows = [[{"role": "user", "text": PROMPT}, {"role": "assistant", "text": caption}] for _ in range(count)]
    return Batch([f"row{i}" for i in range(count)], rows, images(count), [1] * count)  # type: ignore[arg-type]


def first_stage(**arguments: Any) -> UAE:
    settings: dict[str, Any] = {"trained": ["connector", "decoder"], "prompt": PROMPT, "max_new_tokens": 5, **arguments}
    return UAE(vlm(), settings.pop("renderer", None) or renderer(), AdamW(1e-3), **settings)


def second_stage(**arguments: Any) -> GenerationForUnderstanding:
    settings: dict[str, Any] = {
        "trained": ["adapter"],
        "adapter": LoRA(rank=2, alpha=4.0),
        "objective": GRPO(kl_weight=0.0),
        "reward": Redness(),
        "prompt": PROMPT,
        "max_new_tokens": 5,
        "group": 3,
        **arguments,
    }
    own = settings.pop("renderer", None) or renderer()
    return GenerationForUnderstanding(vlm(), own, settings.pop("reward"), settings.pop("objective"), AdamW(1e-2), **settings)


def third_stage(**arguments: Any) -> UnderstandingForGeneration:
    settings: dict[str, Any] = {
        "trained": ["decoder_adapter"],
        "decoder_adapter": LoRA(rank=2, alpha=4.0, targets=["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]),
        "objective": FlowGRPO(num_steps=3, clip=1e-2),
        "reward": Redness(),
        "prompt": PROMPT,
        "max_new_tokens": 5,
        "group": 4,
        "guidance": 2.0,
        **arguments,
    }
    own = settings.pop("renderer", None) or renderer()
    return UnderstandingForGeneration(vlm(), own, settings.pop("reward"), settings.pop("objective"), AdamW(1e-2), **settings)
