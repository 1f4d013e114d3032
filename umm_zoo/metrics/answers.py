"""Metric of generated answers: how many are right."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.metrics.rows import RowMetric, kind_of, name_to_words, rates_by_name, required
from umm_zoo.outputs import Outputs

# All that is neither word nor space, except a decimal point or comma inside a number and the minus before one.
_PUNCTUATION = re.compile(r"(?!(?<=\d)[.,](?=\d))(?!(?<!\w)-(?=\d))[^\w\s]")


def normalise(answer: str) -> str:
    """An answer without what does not count: case, punctuation, white space. Signs and decimal points of numbers stay."""
    text = unicodedata.normalize("NFKC", answer).casefold()
    words = " ".join(_PUNCTUATION.sub(" ", text).split())
    return words or text.strip()  # an answer that is all punctuation is its punctuation


def clauses(text: str) -> list[str]:
    """Clauses of a text, which semicolons separate; their order, case and runs of white space do not count. Alphabetical."""
    return sorted(" ".join(words) for clause in text.lower().split(";") if (words := clause.split()))


def same_answer(answer: str, truth: str) -> bool:
    """Whether an answer says what the true one says: the same `clauses` where it has several, else the same after `normalise`."""
    said = clauses if ";" in truth else normalise
    return said(answer) == said(truth)


class AnswerAccuracy(RowMetric):
    """Share of rows whose generated answer equals the true one after :func:`normalise`, overall and per question kind.

    Rows without an answer in the conversation are left out. ``compute`` gives ``overall`` and one entry per ``meta["kind"]`` found
    (a row without a kind is counted under its task). Long captions are nothing to compare word by word: leave their task out.

    Raises:
        UserError: there are no ``answers``, or a kind is called "overall" or is longer than 32 bytes.
    """

    reads = ("answers",)
    scores = ("overall", "*")

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        answers, truths = required(outputs, "answers", self), batch.answers()
        for row in self.chosen(batch):
            if truths[row]:
                right = normalise(answers[row]) == normalise(truths[row])
                yield [int(right), *name_to_words(kind_of(batch.meta[row]))]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """``overall`` first, then each kind."""
        hits = records[:, 0]
        return {"overall": hits.double().mean(), **rates_by_name(hits, records[:, 1:])}
