"""DualToken: two codebooks on two layers of one encoder (Song et al., 2025, arXiv 2503.14324)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.visual_tokenizer import PIXEL, Tokenized, VisualTokenizer
from umm_zoo.batch import Batch
from umm_zoo.errors import Weight
from umm_zoo.pretraining.judged import Judges
from umm_zoo.pretraining.tokenizer import Tokenizer

#: Name of the bottleneck that keeps what the encoder understands.
SEMANTIC = "semantic"


class DualToken(Tokenizer):
    """DualToken: pixels from codes of a shallow layer, the frozen teacher's features from codes of a deep one; no texts.

    ``loss = pixel_weight * pixels + semantic_weight * (mse - cosine) + quantizer_weight * commitments``, the second between what
    leaves the branch ``semantic`` and the teacher's tokens of the same layer. The cosine's least value is -1, so a total may be
    negative. The release also compares the vectors that the rest of the encoder makes of the quantized layer; that is not here.

    Args:
        tokenizer: with branches ``pixel`` and ``semantic``, from and to the encoder's width.
        teacher: the encoder as it was before training; frozen.
        semantic_weight, quantizer_weight: lambda_2 and lambda_3 (the release's).
        mse_weight, l1_weight: of the pixels, lambda_1 (the release's).
        judges: see ``Tokenizer``.

    Raises:
        ValueError: other branches; a teacher of another width or depth.
    """

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        teacher: FeatureEncoder,
        semantic_weight: Weight = 1.0,
        quantizer_weight: Weight = 5.0,
        mse_weight: Weight = 5.0,
        l1_weight: Weight = 0.0,
        judges: Judges | None = None,
    ) -> None:
        if set(tokenizer.branches) != {PIXEL, SEMANTIC}:
            raise ValueError(
                f"DualToken.tokenizer.branches: found {sorted(tokenizer.branches)}, expected '{PIXEL}' and '{SEMANTIC}'"
            )
        widths = (teacher.token_width, teacher.num_layers, teacher.grid)
        if widths != (tokenizer.encoder.token_width, tokenizer.encoder.num_layers, tokenizer.encoder.grid):
            raise ValueError(
                "DualToken.teacher: found another width, depth or grid than the encoder's, expected the encoder as it was"
            )
        super().__init__(tokenizer, mse_weight, l1_weight, quantizer_weight, judges=judges)
        self.teacher, self.semantic_weight = freeze(teacher), semantic_weight

    def parts(self) -> dict[str, nn.Module]:
        """Those of the tokenizer, and the ``teacher``."""
        return {**super().parts(), "teacher": self.teacher}

    def paper_losses(self, losses: dict[str, Tensor], tokenized: Tokenized, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Adds ``semantic``."""
        made = tokenized.squeezed[SEMANTIC].tokens
        with torch.no_grad():
            wanted = self.teacher.tokens(images, self.codec.branch(SEMANTIC).layer)
        losses["semantic"] = F.mse_loss(made, wanted) - F.cosine_similarity(made, wanted, dim=-1).mean()
        losses["loss"] = losses["loss"] + self.semantic_weight * losses["semantic"]
        return losses
