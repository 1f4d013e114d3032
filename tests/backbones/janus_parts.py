"""Tiny Janus models with random weights, large enough that a wrong mask or position shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from umm_zoo.backbones.janus import Janus

TEXT = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
VQ = {
    "num_embeddings": 20,
    "embed_dim": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 16,
}
JANUS: dict[str, Any] = {"text_config": TEXT, "vision_config": VISION, "vq_config": VQ}
TEXTS = ["a red circle", "a large blue square at the left"]


def spread(model: nn.Module) -> None:
    """Weights with outputs of about the size of their inputs; the library's 0.02 leaves a model so flat that nothing shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def janus(config: dict[str, Any] = JANUS, **arguments: Any) -> Janus:
    built = Janus.from_config(config, **arguments)
    spread(built)
    return built.eval()
