"""Reward for an image generated from a caption: its likeness to the image that the caption describes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.feature_encoder import FeatureEncoder, features_of
from umm_zoo.backbones.frozen import freeze
from umm_zoo.batch import Batch, image_of_each_row
from umm_zoo.rewards.base import Reward, group_size


class ReconstructionReward(Reward):
    """Cosine of the features of candidate and source, in [-1, 1]: UAE's only reward, without threshold, length or format term.

    Both images go through the same preprocessing, the encoder's own, which is also that of the benchmark. (The released reward
    code divides the candidate by 255 once too often and squeezes where the benchmark crops.)

    Reference: Yan et al., 2025, arXiv 2509.09666, section 2.

    Args:
        encoder: CLIP ViT-L/14 with its projection in the released code; frozen here.
    """

    def __init__(self, encoder: FeatureEncoder) -> None:
        super().__init__()
        self.encoder = freeze(encoder)

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        """The source of a row is encoded once for its whole group; its size need not be that of the candidates."""
        generated = features_of(self.encoder, candidates)  # [R, F]
        source = features_of(self.encoder, [image.to(candidates[0]) for image in image_of_each_row(batch)])  # [B, F]
        return F.cosine_similarity(generated, source.repeat_interleave(group_size(candidates, batch), dim=0), dim=1)
