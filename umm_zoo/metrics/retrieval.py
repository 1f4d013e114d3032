"""Metrics of retrieval: of images by texts, and of texts by images."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.features import TextImageEncoder
from umm_zoo.backbones.frozen import freeze
from umm_zoo.batch import Batch, image_of_each_row, map_by_size
from umm_zoo.errors import Count
from umm_zoo.metrics.rows import RowMetric, required
from umm_zoo.outputs import Outputs

_TIE = 1e-6  # cosines closer than this are the same: rounding must not decide between equal captions


class Retrieval(RowMetric):
    """Recall at k of image-text retrieval among all rows of the set, by cosine similarity.

    ``compute`` gives ``image_to_text`` and ``text_to_image``. Row i of the images belongs to row i of the texts. Equal candidates
    share the places that they take together: at k = 1 two rows with the same caption score 1/2 each, and a collapsed model scores
    chance. The value depends on the number of rows, so compare on one set only.

    Args:
        kinds, tasks: see ``RowMetric``.
        at: k, candidates among which the row's own must be.

    Raises:
        UserError: there are no ``image_features`` or no ``text_features``.
    """

    reads: tuple[str, ...] = ("image_features", "text_features")
    scores = ("image_to_text", "text_to_image")
    record_dtype = torch.float32

    def __init__(self, kinds: list[str] | None = None, tasks: list[str] | None = None, at: Count = 1) -> None:
        super().__init__(kinds, tasks)
        self.at = at

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Keep ``image_features`` and ``text_features``."""
        if rows := self.chosen(batch):
            self._add(*(required(outputs, name, self)[rows] for name in self.reads))

    def _add(self, images: Tensor, texts: Tensor) -> None:
        self.add_rows(torch.cat([F.normalize(feature.float(), dim=1) for feature in (images, texts)], dim=1))

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Recall in both directions."""
        images, texts = records.double().chunk(2, dim=1)
        return {"image_to_text": _recall(images, texts, self.at), "text_to_image": _recall(texts, images, self.at)}


class EncodedRetrieval(Retrieval):
    """Recall at k of what a method has made, judged by an encoder that it does not know: the rest as in ``Retrieval``.

    Of ``answers``: whether a caption is nearer to its own image than to the others, and the image to its caption. Of
    ``generated``: the same of a prompt and the image generated for it; batches for which nothing was generated are left out.

    Args:
        encoder: both towers; frozen.
        judged: what is encoded.
        kinds, tasks, at: see ``Retrieval``.

    Raises:
        UserError: the method does not make what is judged.
    """

    def __init__(
        self,
        encoder: TextImageEncoder,
        judged: Literal["answers", "generated"] = "answers",
        kinds: list[str] | None = None,
        tasks: list[str] | None = None,
        at: Count = 1,
    ) -> None:
        super().__init__(kinds, tasks, at)
        self.encoder, self.judged = freeze(encoder), judged
        self.reads = (judged,)

    @torch.no_grad()
    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Encode the rows that count."""
        rows = self.chosen(batch)
        if not rows or (self.judged == "generated" and outputs.generated is None):
            return
        made = required(outputs, self.judged, self)
        texts = made if self.judged == "answers" else batch.user_texts()
        images = image_of_each_row(batch) if self.judged == "answers" else made
        encoded = map_by_size(self.encoder, [images[row].clamp(-1, 1) for row in rows])
        self._add(torch.stack(encoded), self.encoder.encode_text([texts[row] for row in rows]))


def _recall(queries: Tensor, candidates: Tensor, at: int) -> Tensor:
    points = []
    for start, block in zip(range(0, len(queries), 1024), queries.split(1024), strict=True):  # never the whole square at once
        scores = block @ candidates.T  # [block, N]
        own = scores[torch.arange(len(block)), torch.arange(start, start + len(block))][:, None]
        better, equal = (scores > own + _TIE).sum(dim=1), ((scores - own).abs() <= _TIE).sum(dim=1)
        points.append(((at - better).double() / equal).clamp(0, 1))
    return torch.cat(points).mean()
