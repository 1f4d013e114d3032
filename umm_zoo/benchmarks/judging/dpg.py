"""DPG-Bench: long prompts, taken apart into questions that depend on each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from umm_zoo.benchmarks.base import Item, Verdict
from umm_zoo.benchmarks.files import csv_rows, needed, plain_key, text_of
from umm_zoo.benchmarks.judging.base import MARK, PART, JudgedBenchmark
from umm_zoo.benchmarks.judging.judge import Judge, Question, Reply
from umm_zoo.benchmarks.judging.reading import yes_or_no
from umm_zoo.errors import UserError
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import TextToImage
from umm_zoo.metrics.rows import digest

_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


class DPGBench(JudgedBenchmark):
    """DPG-Bench (ELLA): 1,065 prompts, four images each; a share of questions answered yes, from 0 to 1.

    An image's score is the mean over its prompt's questions, where one counts 0 if one that it depends on does; ``overall`` is the
    mean over prompts of the mean over images, which are as many for each. The four images of a prompt are judged one by one: the
    release stores them as a grid of 2 x 2 and cuts that apart again. Categories (``entity``, ``entity - whole`` …) are shares of
    yes by themselves, over all images; the release takes the last of each prompt.

    The release asks mPLUG-large, which exists nowhere else: scores by another judge are not on the published scale. A question
    without an answer counts as no.

    Args:
        judge: the judge.
        questions: the release's ``dpg_bench.csv``.
        prompts: folder of its prompts as ``ITEM.txt``; None takes the texts beside the questions.
        as_released: with the release's two faults: the first row of questions is skipped, and prompts for which anything fails (a
            question without an answer, one that depends on the skipped row) are left out of every mean.
        judge_prompt: text with a place ``{question}`` in place of ours.

    Reference: ``compute_dpg_bench.py`` of the release of Hu et al., 2024, arXiv 2403.05135.
    """

    name = "dpg"
    per_item = 4
    judge_text = "dpg_judge.json"
    judge_names = {"user": ("question",)}
    official = "by mPLUG-large, times 100"
    scores = ("overall", "failed", "*")

    def __init__(
        self,
        judge: Judge | None = None,
        questions: str | None = None,
        prompts: str | None = None,
        as_released: bool = False,
        judge_prompt: str | None = None,
    ) -> None:
        super().__init__(judge, judge_prompt)
        self.file = needed("questions", questions, "ELLA's dpg_bench/dpg_bench.csv")
        self.prompts, self.as_released = prompts, as_released

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        return csv_rows("questions", self.file, _COLUMNS)[int(self.as_released) :]

    @cached_property
    def categories(self) -> list[str]:
        """Of questions, broad ones and their parts, in alphabetical order."""
        return sorted({name for row in self._rows for name in _categories(row["tuple"])})

    @cached_property
    def _items(self) -> list[Item]:
        asked: dict[str, dict[str, list[Any]]] = {}
        texts: dict[str, str] = {}
        for row in self._rows:
            item = row["item_id"]
            texts.setdefault(item, row["text"])
            try:
                parents = [int(parent) for parent in row["dependency"].split(",")]
                number = int(row["proposition_id"])
            except ValueError as error:
                raise UserError(f"questions: {self.file}: {item}", f"no number ({error})", "numbers of questions") from error
            asked.setdefault(item, {})[str(number)] = [row["question_natural_language"], [p for p in parents if p], row["tuple"]]
        if self.prompts is not None:
            folder = needed("prompts", self.prompts, "the folder of ELLA's dpg_bench/prompts")
            texts = {item: text_of("prompts", folder / f"{item}.txt").strip() for item in asked}
        return [
            Item(plain_key(item), texts[item], meta={MARK: self.name, "kind": "prompts", "item": item, "questions": own})
            for item, own in asked.items()
        ]

    def items(self) -> list[Item]:
        """The prompts, in the order of the file of questions."""
        return self._items

    def command(self, item: Item) -> Command:
        """Images of the prompt."""
        return TextToImage()

    def questions(self, meta: Mapping[str, Any], made: Image.Image, inputs: Sequence[Image.Image]) -> list[Question]:
        """Each question of the prompt."""
        return [Question((self.texts.fill("user", question=question), made)) for question, _, _ in meta["questions"].values()]

    def read(self, answer: str) -> int:
        """1 for yes, 0 for no."""
        return yes_or_no(answer)

    def judged(self, meta: Mapping[str, Any], replies: Sequence[Reply[Any]]) -> Verdict:
        """The share of yes among the questions, and answers by category."""
        asked = meta["questions"]
        answers = {number: reply.value or 0 for number, reply in zip(asked, replies, strict=True)}
        valid, failed = dict(answers), any(reply.value is None for reply in replies)
        left_out = failed and self.as_released
        for number, (_, parents, _) in asked.items():  # in the order of the file, as the release: what is 0 by now passes on
            for parent in map(str, parents):
                left_out |= self.as_released and parent not in valid
                if valid.get(parent, 1) == 0:
                    valid[number] = 0
                    break
        value = sum(valid.values()) / len(valid)
        counts = [0] * (2 * len(self.categories))
        for number, (_, _, category) in asked.items():
            for name in _categories(category):
                place = 2 * self.categories.index(name)
                counts[place] += answers[number]
                counts[place + 1] += 1
        lines = [f"{question} {'yes' if valid[n] else 'no'}" for n, (question, _, _) in asked.items()]
        return Verdict(
            [digest(str(meta["item"])), round(value * PART), int(not left_out), int(failed), *counts],
            float("nan") if left_out else value,
            str(meta["kind"]),
            "; ".join(line for line in lines if line.endswith(" no")),
            {"answers": lines, "failures": [reply.failure for reply in replies if reply.failure]},
            any(reply.unreached for reply in replies),
        )

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """Mean over images, and over the questions of categories."""
        failed = records[:, 3].sum().double()
        if self.as_released:
            records = records[~torch.isin(records[:, 0], records[records[:, 2] == 0, 0])]
        yes, asked = records[:, 4:].sum(dim=0).double().unflatten(0, (-1, 2)).unbind(dim=1)
        shares = {name: yes[place] / asked[place] for place, name in enumerate(self.categories) if asked[place]}
        overall = (records[:, 1].double() / PART).mean()  # of as many images of each prompt; an interval counts some prompts twice
        return {"overall": overall, "failed": failed, **shares}


def _categories(text: str) -> tuple[str, ...]:
    """The broad category of a tuple such as ``attribute - color (truck, red)``, and the narrow one where it has one."""
    narrow = text.split("(")[0].strip()
    return tuple(dict.fromkeys((narrow.split("-")[0].strip(), narrow)))
