"""Base class of benchmarks whose verdicts are a judge's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.benchmarks.base import Benchmark, Verdict
from umm_zoo.benchmarks.judging.judge import Judge, Question, Reply
from umm_zoo.benchmarks.judging.texts import JudgeTexts
from umm_zoo.errors import UserError
from umm_zoo.generation.tensors import to_pil
from umm_zoo.metrics.rows import NAME_WORDS, name_to_words, rates_by_name
from umm_zoo.outputs import Outputs

#: Key of a row's ``meta`` that names the benchmark whose it is.
MARK = "benchmark"
#: Scores stand in records as whole numbers of this part.
PART = 10**9
JUDGES = (
    "judge._target_=umm_zoo.benchmarks.judging.endpoint.EndpointJudge judge.url=http://localhost:8000/v1 judge.model=NAME, or "
    "judge._target_=umm_zoo.benchmarks.judging.local.LocalJudge judge.run=RUN"
)


class JudgedBenchmark(Benchmark):
    """Benchmark of images that a judge scores; rows count whose ``meta["benchmark"]`` is its name.

    ``compute`` gives ``overall``, ``mean`` over rows, the mean of each group by its name, and ``failed``, the number of rows over
    which the judge gave no answer, or none that can be read. ``overall`` is a mean over groups, over those that are there.

    Args:
        judge: the judge.
        judge_prompt: file of texts to the judge in place of those that ship.

    Attributes:
        judge_text: the file of those.
        judge_names: names of the texts in it, and what each must have a place for.
        failures_count: whether a row counts 0 where the judge failed; otherwise it is left out.
        weights: of groups in ``overall``, where they differ.
        highest: the best score of a row.
        official: the judge and the settings of the published scores.

    Raises:
        UserError: there is no judge.
    """

    reads = ("generated",)
    scores: tuple[str, ...] | None = ("overall", "mean", "failed", "*")
    judge_text: ClassVar[str]
    judge_names: ClassVar[Mapping[str, Sequence[str]]] = {"user": ("prompt",)}
    failures_count: ClassVar[bool] = False
    weights: ClassVar[Mapping[str, float]] = {}
    highest: ClassVar[float] = 1.0
    official: ClassVar[str]

    def __init__(self, judge: Judge | None = None, judge_prompt: str | None = None) -> None:
        super().__init__()
        if judge is None:
            raise UserError("judge", f"no judge for {self.name}", JUDGES)
        self.judge = judge
        self.texts = JudgeTexts.read(judge_prompt, self.judge_text, self.judge_names)

    @abstractmethod
    def questions(self, meta: Mapping[str, Any], made: Image.Image, inputs: Sequence[Image.Image]) -> list[Question]:
        """What the judge is asked about one image that was made, and those that it was made of."""

    @abstractmethod
    def read(self, answer: str) -> Any:
        """The value of an answer; a ``ValueError`` where it has none."""

    @abstractmethod
    def judged(self, meta: Mapping[str, Any], replies: Sequence[Reply[Any]]) -> Verdict:
        """The verdict of one row, from a reply to each of its questions."""

    def verdicts(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[int, Verdict]]:
        """(row, verdict) of every row of this benchmark; the judge is asked about all of them at once."""
        if outputs.generated is None:
            return
        rows = [row for row in self.chosen(batch) if batch.meta[row].get(MARK) == self.name]
        images = {row: (to_pil(outputs.generated[row]), [to_pil(image) for image in batch.images_of(row)]) for row in rows}
        asked = {row: self.questions(batch.meta[row], *images[row]) for row in rows}
        replies = iter(self.judge.ask_all([question for own in asked.values() for question in own], self.read))
        for row in rows:
            yield row, self.judged(batch.meta[row], [next(replies) for _ in asked[row]])

    def verdict(self, kind: str, value: float | None, replies: Sequence[Reply[Any]], **columns: Any) -> Verdict:
        """A verdict with its record.

        Args:
            kind: group.
            value: score of the row; None where the judge failed.
            replies: of the judge, for the reason.
            columns: further columns.
        """
        failures = "; ".join(dict.fromkeys(reply.failure for reply in replies if reply.failure))
        text = "\n".join(reply.text for reply in replies)
        counted = 0.0 if value is None and self.failures_count else value
        record = [*name_to_words(kind), round((counted or 0.0) * PART), int(counted is not None), int(value is None)]
        score = float("nan") if counted is None else counted / self.highest
        again = any(reply.unreached for reply in replies)
        return Verdict(record, score, kind, failures or " ".join(text.split()), {**columns, "judge": text}, again)

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Means by group and over them."""
        words, scores, counts = records[:, :NAME_WORDS], records[:, NAME_WORDS].double() / PART, records[:, NAME_WORDS + 1] > 0
        return self.means(words[counts], scores[counts]) | {"failed": records[:, NAME_WORDS + 2].sum().double()}

    def means(self, words: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """``overall``, ``mean``, and means of groups, of scores ``[rows]`` of groups ``[rows, NAME_WORDS]``; NaN without rows."""
        if not len(scores):
            nothing = torch.tensor(float("nan"), dtype=torch.float64, device=scores.device)
            return {"overall": nothing, "mean": nothing}
        groups = rates_by_name(scores, words)
        weights = [self.weights.get(name, 1.0) for name in groups]
        overall = sum(weight * value for weight, value in zip(weights, groups.values(), strict=True)) / sum(weights)
        return {"overall": torch.as_tensor(overall), "mean": scores.mean(), **groups}

    def protocol(self) -> dict[str, Any]:
        """The judge, and what it is told."""
        return {"judge": dict(self.judge.identity), "judge_prompt": self.texts.about(), "official": self.official}

    def warnings(self) -> list[str]:
        """That scores are this judge's."""
        return [f"scores are those of this judge; published ones: {self.official}. What the judge is told: {self.texts.source}"]
