"""QLIP: one encoder aligned with texts and quantized for reconstruction (Zhao et al., 2025, arXiv 2502.05178)."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.features import TextImageEncoder
from umm_zoo.backbones.visual_tokenizer import PIXEL, Tokenized, VisualTokenizer
from umm_zoo.batch import Batch
from umm_zoo.errors import Positive, Weight
from umm_zoo.objectives.contrast import ContrastiveLoss, WordSwaps
from umm_zoo.outputs import Outputs
from umm_zoo.pretraining.contrastive import captions, compare
from umm_zoo.pretraining.judged import Judges
from umm_zoo.pretraining.tokenizer import Tokenizer


class QLIP(Tokenizer):
    """QLIP: a tokenizer whose encoder stays a CLIP; reconstruction through the codes, contrast through the unquantized vector.

    Stage 1 trains encoder, text tower, branches and decoder with all terms; stage 2 (``align_weight: 0``, the encoder frozen) the
    decoder with perceptual ones. The paper's balance is a fixed one: ``mse_weight / align_weight`` is about ``L_align / L_mse``,
    each at the end of a run of that loss alone; 1000 to 1 there. The encoder is any CLIP; the released weights, of networks like
    EVA-02's, are not read here.

    Args:
        tokenizer: its encoder has a text tower.
        contrast: softmax in the paper.
        align_weight: of the contrast, alpha_a.
        commitment_weight: of ``|sg(output) - input|^2`` between what enters the bottleneck and what leaves it, alpha_z, a mean over
            elements; only where both have one width.
        negatives: see ``Contrastive``.
        max_scale: see ``Contrastive``.
        mse_weight, quantizer_weight: alpha_r and alpha_q.
        l1_weight, judges: see ``Tokenizer``.

    Raises:
        ValueError: an encoder without a text tower; a commitment between unequal widths.
    """

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        contrast: ContrastiveLoss,
        align_weight: Weight = 1.0,
        commitment_weight: Weight = 1.0,
        negatives: WordSwaps | None = None,
        max_scale: Positive = 100.0,
        mse_weight: Weight = 1000.0,
        quantizer_weight: Weight = 1.0,
        l1_weight: Weight = 0.0,
        judges: Judges | None = None,
    ) -> None:
        if not isinstance(tokenizer.encoder, TextImageEncoder):
            raise ValueError(f"QLIP.tokenizer.encoder: found a {type(tokenizer.encoder).__name__}, expected one with a text tower")
        bottleneck = tokenizer.branch(PIXEL).bottleneck
        if commitment_weight and bottleneck.down.in_dim != bottleneck.up.out_dim:
            found = f"widths {bottleneck.down.in_dim} and {bottleneck.up.out_dim} around the bottleneck"
            raise ValueError(f"QLIP.commitment_weight: found {found}, expected one width, or 0")
        super().__init__(tokenizer, mse_weight, l1_weight, quantizer_weight, judges=judges)
        self.texts = tokenizer.encoder
        self.contrast, self.align_weight, self.commitment_weight = contrast, align_weight, commitment_weight
        self.negatives, self.max_log_scale = negatives, math.log(max_scale)

    def paper_losses(self, losses: dict[str, Tensor], tokenized: Tokenized, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Adds ``commitment``."""
        if self.commitment_weight:
            tokens, made = tokenized.features[PIXEL], tokenized.squeezed[PIXEL].tokens
            losses["commitment"] = F.mse_loss(tokens, made.detach())
            losses["loss"] = losses["loss"] + self.commitment_weight * losses["commitment"]
        return losses

    def batch_losses(self, losses: dict[str, Tensor], vectors: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Adds ``align``, over all rows whatever the sizes of their images."""
        if self.align_weight:
            losses["align"] = self._compared(vectors, batch).scalars["loss"]
            losses["loss"] = losses["loss"] + self.align_weight * losses["align"]
        return losses

    @property
    def makes(self) -> Collection[str]:
        """See ``validation_step``."""
        return (*super().makes, *(("align", "text_features") if self.align_weight else ()))

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Adds ``align`` and ``text_features``, without hard negatives."""
        outputs = super().validation_step(batch, batch_idx)
        if self.align_weight:
            vectors = outputs.image_features
            assert vectors is not None
            compared = compare(self.texts, vectors, captions(batch), self.contrast, None, self.max_log_scale)
            outputs.scalars["align"], outputs.text_features = compared.scalars["loss"], compared.text_features
        return outputs

    def _compared(self, vectors: Tensor, batch: Batch) -> Outputs:
        return compare(self.texts, vectors, captions(batch), self.contrast, self.negatives, self.max_log_scale)
