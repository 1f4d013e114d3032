"""What the rest of an image tower makes of other tokens in the place of a layer's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.features import SigLIPFeatures, SigLIPVisionFeatures


def assert_whole_in_tokens(encoder: FeatureEncoder) -> None:
    """Refuse an encoder whose vector hangs on more than its tokens.

    Raises:
        ValueError: any but SigLIP's, which has no class token.
    """
    if not isinstance(encoder, SigLIPFeatures | SigLIPVisionFeatures):
        raise ValueError(f"found a {type(encoder).__name__}, expected SigLIP's, which has no class token beside its patch tokens")


def vector_of(encoder: FeatureEncoder, tokens: Tensor, layer: int) -> Tensor:
    """The vector ``[B, F]`` of tokens ``[B, N, D]`` that stand for those of ``layer``, see ``FeatureEncoder.tokens``."""
    assert isinstance(encoder, SigLIPFeatures | SigLIPVisionFeatures)
    tower: Any = getattr(encoder.model, "vision_model", encoder.model)
    states = tokens.to(encoder.model.dtype)
    if layer != -1:  # the last tokens are behind the norm
        for block in tower.encoder.layers[encoder.num_layers + 1 + layer :]:
            states = block(states, None)
        states = tower.post_layernorm(states)
    vector: Tensor = tower.head(states)
    return vector.to(tokens.dtype)
