"""Metric of retrieval: of images by texts, and of texts by images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.metrics.rows import RowMetric, required
from umm_zoo.outputs import Outputs

_TIE = 1e-6  # cosines closer than this are the same: rounding must not decide between equal captions


class Retrieval(RowMetric):
    """Recall at 1 of image-text retrieval among all rows of the set, by cosine similarity.

    ``compute`` gives ``image_to_text`` and ``text_to_image``. Row i of the images belongs to row i of the texts. Equal best
    candidates share the point: two rows with the same caption score 1/2 each, and a collapsed model scores chance. The value
    depends on the number of rows, so compare on one set only.

    Raises:
        UserError: there are no ``image_features`` or no ``text_features``.
    """

    reads = ("image_features", "text_features")
    scores = ("image_to_text", "text_to_image")
    record_dtype = torch.float32

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Keep ``image_features`` and ``text_features``."""
        rows = self.chosen(batch)
        features = [required(outputs, name, self)[rows].float() for name in self.reads]
        self.add_rows(torch.cat([F.normalize(feature, dim=1) for feature in features], dim=1))

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Recall in both directions."""
        images, texts = records.double().chunk(2, dim=1)
        return {"image_to_text": _recall(images, texts), "text_to_image": _recall(texts, images)}


def _recall(queries: Tensor, candidates: Tensor) -> Tensor:
    points = []
    for start, block in zip(range(0, len(queries), 1024), queries.split(1024), strict=True):  # never the whole square at once
        scores = block @ candidates.T  # [block, N]
        best = scores >= scores.max(dim=1, keepdim=True).values - _TIE
        own = best[torch.arange(len(block)), torch.arange(start, start + len(block))]
        points.append(own.double() / best.sum(dim=1))
    return torch.cat(points).mean()
