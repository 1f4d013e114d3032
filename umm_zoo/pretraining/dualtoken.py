"""DualToken: two codebooks on two layers of one encoder (Song et al., 2025, arXiv 2503.14324)."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.visual_tokenizer import PIXEL, Tokenized, VisualTokenizer
from umm_zoo.batch import Batch, image_of_each_row, stacked
from umm_zoo.errors import Weight
from umm_zoo.outputs import Outputs
from umm_zoo.pretraining.judged import Judges
from umm_zoo.pretraining.tokenizer import Tokenizer

#: Name of the bottleneck that keeps what the encoder understands.
SEMANTIC = "semantic"


class DualToken(Tokenizer):
    """DualToken: pixels from codes of a shallow layer, the frozen teacher's features from codes of a deep one; no texts.

    ``loss = pixel_weight * pixels + semantic_weight * (mse - cosine) + quantizer_weight * commitments``, the second between what
    leaves the branch ``semantic`` and the teacher's tokens of the same layer. The cosine's least value is -1, so a total may be
    negative. The release also compares the vectors that the rest of the encoder makes of the quantized layer; that is not here.
    With one branch, ``pixel``, its codes serve both: the paper's failing control.

    Args:
        tokenizer: with branches ``pixel`` and ``semantic``, or ``pixel`` alone, from and to the encoder's width.
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
        if set(tokenizer.branches) - {PIXEL, SEMANTIC}:
            found = f"found {sorted(tokenizer.branches)}, expected '{PIXEL}' and '{SEMANTIC}', or '{PIXEL}' alone"
            raise ValueError(f"DualToken.tokenizer.branches: {found}")
        widths = (teacher.token_width, teacher.num_layers, teacher.grid)
        if widths != (tokenizer.encoder.token_width, tokenizer.encoder.num_layers, tokenizer.encoder.grid):
            raise ValueError(
                "DualToken.teacher: found another width, depth or grid than the encoder's, expected the encoder as it was"
            )
        super().__init__(tokenizer, mse_weight, l1_weight, quantizer_weight, judges=judges)
        self.teacher, self.semantic_weight = freeze(teacher), semantic_weight
        self.understood = SEMANTIC if SEMANTIC in tokenizer.branches else PIXEL

    def parts(self) -> dict[str, nn.Module]:
        """Those of the tokenizer, and the ``teacher``."""
        return {**super().parts(), "teacher": self.teacher}

    def paper_losses(self, losses: dict[str, Tensor], tokenized: Tokenized, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Adds ``semantic``."""
        losses["semantic"] = self._semantic(tokenized, images)
        losses["loss"] = losses["loss"] + self.semantic_weight * losses["semantic"]
        return losses

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return (*super().makes, "semantic")

    def _validate(self, batch: Batch) -> Outputs:
        """Adds ``semantic``."""
        outputs = super()._validate(batch)
        images = stacked(image_of_each_row(batch))
        outputs.scalars["semantic"] = self._semantic(self.codec.tokenize(images), images)
        return outputs

    def _semantic(self, tokenized: Tokenized, images: Tensor) -> Tensor:
        """Squared error less the cosine, between what the codes give a reader and the teacher's tokens of that layer."""
        made = tokenized.squeezed[self.understood].tokens
        with torch.no_grad():
            wanted = self.teacher.as_they_are(images, [self.codec.branch(self.understood).layer])[1][0]
        return F.mse_loss(made, wanted) - F.cosine_similarity(made, wanted, dim=-1).mean()
