"""UAE's second family in sizes that run in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from uae_parts import PROMPT, Redness

from tests.backbones.janus_parts import janus
from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.janus import Janus
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.rollouts import Rollouts
from umm_zoo.methods.uae.token_renderer import TokenRenderer
from umm_zoo.methods.uae.unified_grpo import UnifiedCaptionAndDrawing
from umm_zoo.objectives.grpo import GRPO


def unified_stage(
    trained: Sequence[str] = ("adapter",), guidance: float = 1.0, vlm: Janus | None = None, **arguments: Any
) -> UnifiedCaptionAndDrawing:
    settings: dict[str, Any] = {
        "renderer": TokenRenderer(guidance),
        "reward": Redness(),
        "objective": GRPO(kl_weight=0.0),
        "adapter": LoRA(rank=2, alpha=4.0) if "adapter" in trained else None,
        "captions": CaptionSampling(PROMPT, max_new_tokens=5),
        "rollouts": Rollouts(group=3),
    }
    torch.manual_seed(0)
    method = UnifiedCaptionAndDrawing(vlm or janus(), **{**settings, **arguments})
    method.train_only(list(trained))
    return method.train()


def stir(method: UnifiedCaptionAndDrawing) -> UnifiedCaptionAndDrawing:
    """Move the adapter off zero, where only half of its parameters have a gradient."""
    torch.manual_seed(11)
    if method.adapter is not None:
        for parameter in method.adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
    return method
