"""Metrics of free captions against several references each: BLEU and CIDEr-D."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics.text import BLEUScore

from umm_zoo.batch import Batch
from umm_zoo.metrics.answers import normalise
from umm_zoo.metrics.rows import RowMetric, checked_names, chosen_rows, digest, required
from umm_zoo.outputs import Outputs

#: Longest word sequence that is compared.
_ORDERS = range(1, 5)
#: Deviation, in words, of CIDEr-D's penalty for another length.
_SIGMA = 6.0


def references_of(batch: Batch, row: int) -> list[str]:
    """What people have said about the image of a row: ``meta["captions"]`` where there is such a list, else the true answer."""
    given = batch.meta[row].get("captions")
    told = [text for text in given if isinstance(text, str)] if isinstance(given, list) else []
    return [text for text in told or [batch.answers()[row]] if text.strip()]


class BLEU(BLEUScore):
    """BLEU-4 of generated captions over all rows together, from 0 to 1, by torchmetrics (Papineni et al., 2002).

    Captions are compared without case and punctuation (``normalise``). Rows without references are left out. NaN where no row was
    counted; 0 where no four words in a row were right.

    Args:
        kinds, tasks: see ``RowMetric``.
        smooth: add one to each count (Lin and Och, 2004), for sets so small that no four words in a row are ever right.
    """

    reads = ("answers",)
    scores = ("",)
    preds_len: Tensor
    target_len: Tensor

    def __init__(self, kinds: list[str] | None = None, tasks: list[str] | None = None, smooth: bool = False) -> None:
        super().__init__(n_gram=_ORDERS[-1], smooth=smooth)
        self.kinds, self.tasks = checked_names("kinds", kinds), checked_names("tasks", tasks)

    def update(self, outputs: Outputs, batch: Batch) -> None:  # type: ignore[override]
        """Count the rows that have references."""
        rows = chosen_rows(batch, self.kinds, self.tasks)
        answers = required(outputs, "answers", self) if rows else []
        pairs = [(answers[row], references_of(batch, row)) for row in rows]
        pairs = [pair for pair in pairs if pair[1]]
        super().update([normalise(said) for said, _ in pairs], [list(map(normalise, truths)) for _, truths in pairs])

    def compute(self) -> Tensor:
        """The score."""
        return super().compute() if self.target_len else torch.tensor(torch.nan)


class CIDEr(RowMetric):
    """CIDEr-D of generated captions: the value of the COCO server's code, about 0 to 10 (often printed a hundred times that).

    For each length n from 1 to 4, word sequences are weighed by how rare they are among the images of the set, log(images / images
    that mention it); the caption's weighed counts, none above the reference's, are compared with each reference's by their cosine,
    with a penalty ``exp(-(difference in words)^2 / 72)``; mean over references and lengths, times 10. The value depends on the
    set: compare on one set only, and not on a handful of images. Words are those of ``normalise``; the server's code splits them
    with a tokenizer of its own.

    ``compute`` gives one number. Rows without references are left out.

    Reference: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (arXiv 1411.5726), section 4 and 5.
    """

    reads = ("answers",)
    scores = ("",)

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        """Row, text (0 the caption, then its references), length of the sequence, sequence, how often it stands there.

        Each text has one record of the length 0, so that an empty one is known of.
        """
        answers = required(outputs, "answers", self)
        for row in self.chosen(batch):
            if truths := references_of(batch, row):
                own = digest(batch.keys[row])
                for place, text in enumerate([answers[row], *truths]):
                    yield [own, place, 0, 0, 1]
                    for (order, sequence), count in _sequences(text).items():
                        yield [own, place, order, digest(sequence), count]

    def compute(self) -> Any:
        """The score, NaN without any row."""
        records = self.records()
        if not len(records):
            return torch.tensor(torch.nan)
        rows: defaultdict[int, defaultdict[int, Counter[tuple[int, int]]]] = defaultdict(lambda: defaultdict(Counter))
        for row, place, order, sequence, count in records.tolist():
            rows[row][place][order, sequence] = count
        mentioned = Counter(
            sequence for texts in rows.values() for sequence in set().union(*(texts[place] for place in texts if place))
        )
        rarity = {sequence: math.log(len(rows)) - math.log(count) for sequence, count in mentioned.items()}
        unheard = math.log(len(rows))
        scores = [_consensus(texts, lambda sequence: rarity.get(sequence, unheard)) for texts in rows.values()]
        return torch.tensor(math.fsum(scores) / len(scores), dtype=torch.float64)


def _sequences(text: str) -> Counter[tuple[int, str]]:
    words = normalise(text).split()
    return Counter((n, " ".join(words[i : i + n])) for n in _ORDERS for i in range(len(words) - n + 1))


def _consensus(texts: dict[int, Counter[tuple[int, int]]], rarity: Any) -> float:
    """CIDEr-D of one caption (text 0) and its references."""
    said, *truths = (texts[place] for place in sorted(texts))
    mine = _weighed(said, rarity)
    total = 0.0
    for truth in truths:
        theirs = _weighed(truth, rarity)
        gap = _length(said) - _length(truth)
        penalty = math.exp(-(gap**2) / (2 * _SIGMA**2))
        for order in _ORDERS:
            a, b = mine[order], theirs[order]
            norms = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
            overlap = sum(min(x, b[sequence]) * b[sequence] for sequence, x in a.items() if sequence in b)
            total += penalty * overlap / norms if norms else 0.0
    return 10 * total / len(_ORDERS) / len(truths)


def _weighed(counts: Counter[tuple[int, int]], rarity: Any) -> dict[int, dict[tuple[int, int], float]]:
    found: dict[int, dict[tuple[int, int], float]] = {order: {} for order in _ORDERS}
    for sequence, count in counts.items():
        if sequence[0]:
            found[sequence[0]][sequence] = count * rarity(sequence)
    return found


def _length(counts: Counter[tuple[int, int]]) -> int:
    return sum(count for (order, _), count in counts.items() if order == 1)
