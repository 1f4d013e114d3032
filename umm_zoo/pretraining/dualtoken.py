"""DualToken: two codebooks on two layers of one encoder (Song et al., 2025, arXiv 2503.14324)."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.rest_of_tower import assert_whole_in_tokens, vector_of
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

    ``loss = pixels + semantic_weight * semantic + pooled_weight * pooled + quantizer_weight * commitments``. ``semantic`` is the
    squared error less the cosine between what leaves the branch ``semantic`` and the teacher's tokens of the same layer; the
    cosine's least value is -1, so a total may be negative. ``pooled``, the release's alone, is the same between the teacher's one
    vector and that which the rest of the encoder makes of the quantized tokens in the place of the layer's own. The release weighs
    the tokens 5 and the vector 1. With one branch, ``pixel``, its codes serve both: the paper's failing control. Released weights
    are not read here: their pixel path adds a projection of layer 4, which the paper does not have, and moves its table in a step.

    Args:
        tokenizer: with branches ``pixel`` and ``semantic``, or ``pixel`` alone, from and to the encoder's width.
        teacher: the encoder as it was before training; frozen.
        semantic_weight, quantizer_weight: lambda_2 and lambda_3 (not published; 1 is ours, 5 the release's).
        mse_weight, l1_weight: of the pixels, lambda_1 (the release's).
        judges: see ``Tokenizer``.
        pooled_weight: 0 in the paper.

    Raises:
        ValueError: other branches; a teacher of another width or depth; a pooled term of an encoder with a class token.
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
        pooled_weight: Weight = 0.0,
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
        if pooled_weight:
            try:
                assert_whole_in_tokens(tokenizer.encoder)
            except ValueError as error:
                raise ValueError(f"DualToken.pooled_weight: {error}") from None
        self.teacher, self.semantic_weight, self.pooled_weight = freeze(teacher), semantic_weight, pooled_weight
        self.understood = SEMANTIC if SEMANTIC in tokenizer.branches else PIXEL

    def parts(self) -> dict[str, nn.Module]:
        """Those of the tokenizer, and the ``teacher``."""
        return {**super().parts(), "teacher": self.teacher}

    def paper_losses(self, losses: dict[str, Tensor], tokenized: Tokenized, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Adds ``semantic``, and ``pooled`` where it has a weight."""
        losses |= (found := self._understanding(tokenized, images))
        losses["loss"] = losses["loss"] + self.semantic_weight * found["semantic"]
        if self.pooled_weight:
            losses["loss"] = losses["loss"] + self.pooled_weight * found["pooled"]
        return losses

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return (*super().makes, "semantic", *(("pooled",) if self.pooled_weight else ()))

    def _validate(self, batch: Batch) -> Outputs:
        """Adds ``semantic``, and ``pooled`` where it has a weight."""
        outputs = super()._validate(batch)
        images = stacked(image_of_each_row(batch))
        outputs.scalars |= self._understanding(self.codec.tokenize(images), images)
        return outputs

    def _understanding(self, tokenized: Tokenized, images: Tensor) -> dict[str, Tensor]:
        """What the codes give a reader against the teacher: its tokens of that layer, and its vector."""
        made, layer = tokenized.squeezed[self.understood].tokens, self.codec.branch(self.understood).layer
        with torch.no_grad():
            vector, (wanted,) = self.teacher.as_they_are(images, [layer])
        found = {"semantic": apart(made, wanted)}
        if self.pooled_weight:
            found["pooled"] = apart(vector_of(self.codec.encoder, made, layer), vector)
        return found


def apart(made: Tensor, wanted: Tensor) -> Tensor:
    """Squared error less the cosine, means, ``[]``."""
    return F.mse_loss(made, wanted) - F.cosine_similarity(made, wanted, dim=-1).mean()
