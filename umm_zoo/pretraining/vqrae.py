"""VQRAE: codes as wide as the features of an encoder that understands (arXiv 2511.23386)."""

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


class VQRAE(Tokenizer):
    """VQRAE: a wide SimVQ table over a frozen encoder (stage 1), then the encoder too, held to what it was (stage 2).

    ``loss = pixels + table + distill_weight * |features - teacher|^2``, the last between LayerNormed, *unquantized* tokens of the
    layer that is quantized (which norm is not published; ours).

    Args:
        tokenizer: one branch, ``pixel``.
        teacher: the encoder as it was; frozen. None in stage 1.
        distill_weight: lambda_d (not published; 1 is ours).
        mse_weight, l1_weight, quantizer_weight, judges: see ``Tokenizer``.
    """

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        teacher: FeatureEncoder | None = None,
        distill_weight: Weight = 1.0,
        mse_weight: Weight = 1.0,
        l1_weight: Weight = 0.0,
        quantizer_weight: Weight = 1.0,
        judges: Judges | None = None,
    ) -> None:
        super().__init__(tokenizer, mse_weight, l1_weight, quantizer_weight, judges=judges)
        self.teacher, self.distill_weight = None if teacher is None else freeze(teacher), distill_weight

    def parts(self) -> dict[str, nn.Module]:
        """Those of the tokenizer, and the ``teacher`` where there is one."""
        return super().parts() | ({} if self.teacher is None else {"teacher": self.teacher})

    def paper_losses(self, losses: dict[str, Tensor], tokenized: Tokenized, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Adds ``distill``."""
        if self.teacher is not None:
            tokens = tokenized.features[PIXEL]
            with torch.no_grad():
                wanted = self.teacher.as_they_are(images, [self.codec.branch(PIXEL).layer])[1][0]
            sizes = tokens.shape[-1:]
            losses["distill"] = F.mse_loss(F.layer_norm(tokens, sizes), F.layer_norm(wanted, sizes))
            losses["loss"] = losses["loss"] + self.distill_weight * losses["distill"]
        return losses
