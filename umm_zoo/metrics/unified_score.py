"""Metric of likeness of generated and original images to several image encoders: UAE's Unified-Score."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.feature_encoder import FeatureEncoder, features_of
from umm_zoo.backbones.frozen import freeze
from umm_zoo.batch import Batch, Images
from umm_zoo.metrics.rows import RowMetric, generated_pairs, required
from umm_zoo.outputs import Outputs


class UnifiedScore(RowMetric):
    """100 times the cosine of features, averaged over images for each encoder; ``unified`` is the encoders' plain mean.

    Unified-Bench's first protocol: an image is captioned, generated from the caption alone, and compared with itself. The
    paper's encoders are CLIP ViT-L/14 (projected), LongCLIP-L, DINOv2-large and DINOv3-L (class tokens). The encoder that the
    reward uses measures what was trained for; the self-supervised ones are the fair columns.

    Every generated image has a partner and every encoder sees every pair: there is no way to leave one out (the released scorer
    does so silently).

    Reference: Yan et al., 2025, arXiv 2509.09666, section 4.

    Args:
        encoders: by the name of their column.
        images: which images are compared.
        kinds, tasks: see ``RowMetric``.

    Raises:
        ValueError: no encoder, or a column called ``unified``.
        UserError: a batch of generated images lacks those to compare, or what they should be.
    """

    record_dtype = torch.float64

    def __init__(
        self,
        encoders: dict[str, FeatureEncoder],
        images: Literal["generated", "from_true_captions"] = "generated",
        kinds: list[str] | None = None,
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(kinds, tasks)
        if not encoders or "unified" in encoders:
            raise ValueError(f"UnifiedScore.encoders: found {sorted(encoders)}, expected one or more, none called 'unified'")
        self.encoders = nn.ModuleDict({name: freeze(encoder) for name, encoder in encoders.items()})
        self.images, self.reads = images, (images,)
        self.scores = (*encoders, "unified")

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Compare the images with what they should be, row by row."""
        self.of_rows = {}
        if (pairs := generated_pairs(outputs, batch, self, same_size=False)) is None:
            return
        images, references = required(outputs, self.images, self), pairs[1]
        if rows := self.chosen(batch):
            records = self.cosines([images[row] for row in rows], [references[row] for row in rows]).double().T
            self.add_rows(records)
            of_rows = zip(rows, (100 * records).tolist(), strict=True)
            self.of_rows = {row: dict(zip(self.encoders, values, strict=True)) for row, values in of_rows}

    @torch.no_grad()
    def cosines(self, images: Images, references: Images) -> Tensor:
        """Cosine of the features of each pair, ``[number of encoders, B]``; the two may differ in size."""
        encoders: list[Any] = list(self.encoders.values())
        pairs = ([features_of(encoder, side) for side in (images, references)] for encoder in encoders)
        return torch.stack([F.cosine_similarity(made, original, dim=1) for made, original in pairs])

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """One score per encoder and their mean."""
        scores = dict(zip(self.encoders, 100 * records.mean(dim=0), strict=True))
        return {**scores, "unified": torch.stack(list(scores.values())).mean()}
