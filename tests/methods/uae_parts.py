"""UAE's blocks in sizes that run in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tiny_configs
import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.batch import Batch
from umm_zoo.blocks.connectors import MLPConnector
from umm_zoo.methods.uae.base import UAEBase
from umm_zoo.methods.uae.captioner_grpo import GenerationForUnderstanding
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.decoder_grpo import UnderstandingForGeneration
from umm_zoo.methods.uae.pretraining import UAE
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.methods.uae.rollouts import Rollouts
from umm_zoo.objectives.flow_grpo import FlowGRPO
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.objectives.solvers import Euler
from umm_zoo.rewards import Reward

VLM = tiny_configs.qwen(24, [2, 2, 2], intermediate_size=32)
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
CODEC = tiny_configs.codec(4)
PROMPT = "<image>\nDescribe the image."


class Redness(Reward):
    """The mean of the red channel."""

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        return torch.stack([image[0].mean() for image in candidates])


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


def unequal_batch() -> Batch:
    """Two rows whose images have other sizes and shapes."""
    rows, shown = batch(), [torch.zeros(3, 24, 8), images(1)[0]]
    shown[0][:, 8:] = 0.7
    return Batch(rows.keys, rows.conversations, shown, [1, 1])


def stage(kind: type[UAEBase], trained: list[str], arguments: dict[str, Any]) -> Any:
    """A stage that trains some parts, with the renderer from above unless another is given."""
    own = arguments.pop("renderer", None) or renderer()
    method = kind(vlm=vlm(), renderer=own, **{"captions": CaptionSampling(PROMPT, max_new_tokens=5), **arguments})
    method.train_only(trained)
    return method


def first_stage(trained: Sequence[str] = ("connector", "decoder"), **arguments: Any) -> UAE:
    return stage(UAE, list(trained), arguments)


def second_stage(trained: Sequence[str] = ("adapter",), **arguments: Any) -> GenerationForUnderstanding:
    settings: dict[str, Any] = {
        "adapter": LoRA(rank=2, alpha=4.0),
        "objective": GRPO(kl_weight=0.0),
        "reward": Redness(),
        "rollouts": Rollouts(group=3),
        "num_steps": 3,
    }
    return stage(GenerationForUnderstanding, list(trained), {**settings, **arguments})


def third_stage(trained: Sequence[str] = ("decoder_adapter",), **arguments: Any) -> UnderstandingForGeneration:
    settings: dict[str, Any] = {
        "decoder_adapter": LoRA(rank=2, alpha=4.0, targets=["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]),
        "objective": FlowGRPO(num_steps=3, clip=1e-2),
        "reward": Redness(),
        "rollouts": Rollouts(group=4),
        "guidance": 2.0,
    }
    return stage(UnderstandingForGeneration, list(trained), {**settings, **arguments})
