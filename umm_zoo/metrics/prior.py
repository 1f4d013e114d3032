"""Metric of what answers are worth that are given without looking at the image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from umm_zoo.batch import IMAGE_MARKER, Batch
from umm_zoo.metrics.answers import normalise
from umm_zoo.metrics.rows import RowMetric, digest, kind_of, name_to_words, rates_by_name
from umm_zoo.outputs import Outputs


class LanguagePrior(RowMetric):
    """Accuracy of answers given from the question's text alone; to be printed beside :class:`AnswerAccuracy`.

    No model takes part: the numbers come from the questions and answers of the evaluated set. ``held_out`` is the number to quote,
    and the entry of each kind its part over that kind: the answers counted in one half of the rows (by a hash of their keys) are
    given in the other half and the reverse, falling back on the kind's most frequent answer for a new question text.
    ``in_set_bound`` says how often one is right who gives each question text its most frequent answer *in this very set*: no
    language-only model can beat that on this set, and where few questions share a text none comes near (it is 1 where all texts
    differ). Ties go to the answer with the smaller hash. ``kinds`` and ``tasks`` should be those of :class:`AnswerAccuracy`.
    """

    scores = ("held_out", "in_set_bound", "*")

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        prompts, truths = batch.prompts(), batch.answers()
        for row in self.chosen(batch):
            if truths[row]:
                question = normalise(" ".join(turn["text"] for turn in prompts[row]).replace(IMAGE_MARKER, " "))
                half = digest(batch.keys[row]) & 1
                words = name_to_words(kind_of(batch.meta[row]))
                yield [digest(question), digest(normalise(truths[row])), half, *words]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """``held_out``, each kind's part of it, ``in_set_bound``."""
        question, answer, half, words = records[:, 0], records[:, 1], records[:, 2], records[:, 3:]
        hits = _most_frequent(question, answer, question)[0] == answer
        kind = torch.unique(words, dim=0, return_inverse=True)[1]
        blind = torch.zeros_like(hits)
        for side in (0, 1):
            seen, wanted = half != side, half == side
            if seen.any() and wanted.any():
                guess, known = _most_frequent(question[seen], answer[seen], question[wanted])
                fallback, kind_known = _most_frequent(kind[seen], answer[seen], kind[wanted])
                right = torch.where(known, guess, fallback) == answer[wanted]
                blind[wanted] = right & (known | kind_known)
        return {"held_out": blind.double().mean(), **rates_by_name(blind, words), "in_set_bound": hits.double().mean()}


def _most_frequent(groups: Tensor, values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry of ``wanted``, the most frequent value [N] of that group, and whether the group exists [N]."""
    pairs, counts = torch.unique(torch.stack([groups, values], dim=1), dim=0, return_counts=True)  # sorted by group, value
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[torch.argsort(pairs[order, 0], stable=True)]  # by group, then the most frequent first
    pairs = pairs[order]
    start = torch.searchsorted(pairs[:, 0].contiguous(), wanted.contiguous()).clamp(max=len(pairs) - 1)
    return pairs[start, 1], pairs[start, 0] == wanted
