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


def negative_of(batch: Batch, row: int) -> str:
    """How the absent objects of a row's questions were chosen; empty where nobody says."""
    return str(batch.meta[row].get("negative") or "")


def yes_no_rates(truth: Tensor, answer: Tensor, unparsed: Tensor) -> dict[str, Tensor]:
    """POPE's five numbers over rows ``[rows]``, and the sum of ``unparsed``; a ratio without cases is 0."""
    hits = truth == answer
    true_positives = (hits & (truth == _YES)).sum().double()
    said_yes, were_yes = (answer == _YES).sum(), (truth == _YES).sum()
    precision = true_positives / said_yes.clamp(min=1)
    recall = true_positives / were_yes.clamp(min=1)
    return {
        "accuracy": hits.double().mean(),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny),
        "yes_ratio": said_yes.double() / len(truth),
        "unparsed": unparsed.sum().double(),
    }


class YesNo(RowMetric):
    """POPE's five numbers for object hallucination (Li et al., 2023, arXiv 2305.10355), "yes" being positive.

    ``compute`` gives ``accuracy``, ``precision``, ``recall``, ``f1``, ``yes_ratio`` (share of rows answered yes) and ``unparsed``,
    the number of answers whose first word is neither yes nor no. Those count as wrong: never as a yes, but in the denominators of
    accuracy, recall and yes_ratio. This is for models that answer in a word, and shows one that does not answer; ``POPE`` reads
    sentences as the benchmark's own script does. Where rows carry ``meta["negative"]`` (how the absent object was chosen: random,
    popular, adversarial), ``accuracy_<negative>`` is the accuracy over those rows. The kind ``exists`` is counted unless ``kinds``
    says others.

    Raises:
        UserError: there are no ``answers``, or the truth of a counted row is neither yes nor no.
    """

    reads = ("answers",)
    scores = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed", "*")

    def __init__(self, kinds: list[str] | None = None, tasks: list[str] | None = None) -> None:
        super().__init__(["exists"] if kinds is None else kinds, tasks)

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[list[int]]:
        answers = required(outputs, "answers", self)
        for row, truth in self.truths(batch).items():
            yield [truth, *self.judge(answers[row]), *name_to_words(negative_of(batch, row))]

    def truths(self, batch: Batch) -> dict[int, int]:
        """1 for yes and 0 for no, by row that counts.

        Raises:
            UserError: the true answer of one is neither.
        """
        answers = batch.answers()
        found = {row: parse_yes_no(answers[row]) for row in self.chosen(batch)}
        if (odd := next((row for row, truth in found.items() if truth == _UNPARSED), None)) is not None:
            raise UserError("", f"the true answer '{answers[odd]}'", "yes or no", row=odd)
        return found

    def judge(self, answer: str) -> tuple[int, bool]:
        """What an answer counts as (1 for yes, 0 for no, -1 for a wrong one), and whether it is neither yes nor no."""
        said = parse_yes_no(answer)
        return said, said == _UNPARSED

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """The five and ``unparsed``, and the accuracy of each negative."""
        by_negative = rates_by_name(records[:, 0] == records[:, 1], records[:, 3:])
        named = {f"accuracy_{negative}": rate for negative, rate in by_negative.items() if negative}
        return yes_no_rates(*records[:, :3].unbind(dim=1)) | named


class POPE(YesNo):
    """``YesNo`` by the rule of POPE's released script, for numbers that stand beside published ones.

    Of the text before the first full stop, without its commas, split at blanks: an answer is no where "No", "no" or "not" is one
    of the words, and yes in every other case. To the letter: "no!", "NO" and an empty answer are yes, "not sure" is no, and what
    follows the first sentence is not read. ``unparsed`` counts answers that are taken for a yes although they do not say one.

    Reference: ``evaluate.py`` of the release of Li et al., 2023, arXiv 2305.10355.
    """

    def judge(self, answer: str) -> tuple[int, bool]:
        """1 for yes, 0 for no."""
        sentence = answer.split(".", 1)[0].replace(",", "")
        said = _NO if {"No", "no", "not"} & set(sentence.split(" ")) else _YES
        return said, said == _YES and "yes" not in normalise(answer).split(" ")
