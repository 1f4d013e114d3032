"""How alike drawn and original images are to several image encoders: UAE's Unified-Score."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from umm_zoo.backbones.features import FeatureEncoder
from umm_zoo.backbones.frozen import freeze
from umm_zoo.batch import Batch
from umm_zoo.metrics.rows import chosen_rows, required


class UnifiedScore(Metric):
    """100 times the cosine of features, averaged over images for each encoder; ``unified`` is the encoders' plain mean.

    Unified-Bench's first protocol: an image is captioned, drawn again from the caption alone, and compared with itself. The
    paper's encoders are CLIP ViT-L/14 (projected), LongCLIP-L, DINOv2-large and DINOv3-L (class tokens). The encoder that the
    reward uses measures what was trained for; the self-supervised ones are the fair columns.

    Every image has a partner and every encoder sees every pair: there is no way to leave one out (the released scorer does so
    silently).

    Reference: Yan et al., 2025, arXiv 2509.09666, section 4.

    Args:
        encoders: by the name of their column.
        images: name of the drawn images in the outputs, ``[B, 3, H, W]`` in [-1, 1] (``oracle_images`` for those drawn from
            true captions).
        kinds, tasks: count these rows only.

    Raises:
        ValueError: no encoder, a column called ``unified``, or ``outputs`` without drawn images and ``originals``.
    """

    full_state_update = False
    higher_is_better = True
    totals: Tensor
    count: Tensor

    def __init__(
        self,
        encoders: dict[str, FeatureEncoder],
        images: str = "generated",
        kinds: list[str] | None = None,
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__()
        if not encoders or "unified" in encoders:
            raise ValueError(f"UnifiedScore.encoders: found {sorted(encoders)}, expected one or more, none called 'unified'")
        self.encoders = nn.ModuleDict({name: freeze(encoder) for name, encoder in encoders.items()})
        self.images, self.kinds, self.tasks = images, kinds, tasks
        self.add_state("totals", torch.zeros(len(encoders), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, outputs: dict[str, Any], batch: Batch) -> None:
        """Compare ``outputs[images]`` with ``outputs["originals"]``, row by row."""
        drawn, originals = required(outputs, self.images, self), required(outputs, "originals", self)
        if len(drawn) != len(batch) or len(originals) != len(batch):
            raise ValueError(f"metrics.UnifiedScore: {len(drawn)} images and {len(originals)} originals for {len(batch)} rows")
        if rows := chosen_rows(batch, self.kinds, self.tasks):
            self.totals += self.cosines(drawn[rows], originals[rows]).double().sum(dim=1)
            self.count += len(rows)

    def cosines(self, drawn: Tensor, originals: Tensor) -> Tensor:
        """``[number of encoders, B]``."""
        return torch.stack([cosines_under(encoder, drawn, originals) for encoder in self.encoders.values()])  # type: ignore[arg-type]

    def compute(self) -> dict[str, Tensor]:
        """One score per encoder and their mean; empty when nothing was seen."""
        if not self.count:
            return {}
        scores = dict(zip(self.encoders, 100 * self.totals / self.count, strict=True))
        return {**scores, "unified": torch.stack(list(scores.values())).mean()}


@torch.no_grad()
def cosines_under(encoder: FeatureEncoder, drawn: Tensor, originals: Tensor) -> Tensor:
    """Cosine of the features of each pair, ``[B]``."""
    return F.cosine_similarity(encoder(drawn.clamp(-1, 1)).float(), encoder(originals.clamp(-1, 1)).float(), dim=1)
