"""Metric of yes/no questions about what is in an image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.metrics.answers import normalise
from umm_zoo.metrics.rows import RowMetric, name_to_words, rates_by_name, required
from umm_zoo.outputs import Outputs

_YES, _NO, _UNPARSED = 1, 0, -1


def parse_yes_no(answer: str) -> int:
    """1 for yes, 0 for no, -1 for anything else; the first word decides ("Yes, there is a dog.")."""
    first = normalise(answer).split(" ", 1)[0]
    return {"yes": _YES, "no": _NO}.get(first, _UNPARSED)


class YesNo(RowMetric):
    """POPE's five numbers for object hallucination (Li et al., 2023, arXiv 2305.10355), "yes" being positive.

    ``compute`` gives ``accuracy``, ``precision``, ``recall``, ``f1``, ``yes_ratio`` (share of rows answered yes) and ``unparsed``,
    the number of answers that are neither yes nor no. Those count as wrong: never as a yes, but in the denominators of accuracy,
    recall and yes_ratio. (POPE's script takes whatever holds no "no" for a yes, which hides a model that does not answer.) Where
    rows carry ``meta["negative"]`` (how the absent object was chosen: random, popular, adversarial), ``accuracy_<negative>`` is
    the accuracy over those rows. The kind ``exists`` is counted unless ``kinds`` says others.

    Raises:
        UserError: there are no ``answers``, or the truth of a counted row is neither yes nor no.
    """

    reads = ("answers",)

    def __init__(self, kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        super().__init__(["exists"] if kinds is None else kinds, tasks)

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        answers, truths = required(outputs, "answers", self), batch.answers()
        for row in self.chosen(batch):
            truth = parse_yes_no(truths[row])
            if truth == _UNPARSED:
                raise UserError("", f"the true answer '{truths[row]}'", "yes or no", row=row)
            negative = str(batch.meta[row].get("negative") or "")
            yield [truth, parse_yes_no(answers[row]), *name_to_words(negative)]

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """The five and ``unparsed``; a ratio without cases is 0."""
        truth, answer = records[:, 0], records[:, 1]
        hits = truth == answer
        true_positives = (hits & (truth == _YES)).sum().double()
        said_yes, were_yes = (answer == _YES).sum(), (truth == _YES).sum()
        precision = true_positives / said_yes.clamp(min=1)
        recall = true_positives / were_yes.clamp(min=1)
        values = {
            "accuracy": hits.double().mean(),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny),
            "yes_ratio": said_yes.double() / len(records),
            "unparsed": (answer == _UNPARSED).sum().double(),
        }
        by_negative = rates_by_name(hits, records[:, 2:])
        return values | {f"accuracy_{negative}": rate for negative, rate in by_negative.items() if negative}
