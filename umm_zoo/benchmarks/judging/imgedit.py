"""ImgEdit-Bench, the basic part: single edits of nine types, scored from three sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from PIL import Image

from umm_zoo.benchmarks.base import Item, Verdict
from umm_zoo.benchmarks.files import image_files, needed, plain_key, rows_in
from umm_zoo.benchmarks.judging.base import MARK, JudgedBenchmark
from umm_zoo.benchmarks.judging.judge import Judge, Question, Reply
from umm_zoo.benchmarks.judging.reading import lines_of_scores
from umm_zoo.errors import UserError
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import Edit


class ImgEdit(JudgedBenchmark):
    """ImgEdit-Bench (basic): 737 edits; three scores from 1 to 5 by a text of the edit's type, their mean to two decimals.

    ``overall`` is the mean of the means of the types, as in published tables. Edits over which the judge failed are left out, as in
    the release. The release's texts to the judge, which have no licence, are not shipped: its ``prompts.json`` reproduces them.

    Args:
        judge: the judge.
        prompts: the release's ``basic_edit.json``.
        images: folder of its images.
        judge_prompt: the release's ``prompts.json``, or a map like it: a text by type, with a place ``<edit_prompt>``.

    Reference: ``Benchmark/Basic`` of the release of Ye et al., 2025, arXiv 2505.20275.
    """

    name = "imgedit"
    judge_text = "imgedit_judge.json"
    judge_names = {}  # types of edits; each is looked for where an item needs it
    highest = 5.0
    official = "by GPT-4o"

    def __init__(
        self,
        judge: Judge | None = None,
        prompts: str | None = None,
        images: str | None = None,
        judge_prompt: str | None = None,
    ) -> None:
        super().__init__(judge, judge_prompt)
        self.prompts, self.images = prompts, images

    @cached_property
    def _items(self) -> list[Item]:
        file = needed("prompts", self.prompts, "ImgEdit's Benchmark/Basic/basic_edit.json")
        folder = needed("images", self.images, "the folder of ImgEdit's original images (animal/…, style/…)")
        rows = rows_in("prompts", file, ("id", "prompt", "edit_type"))
        for key, row in rows:
            if "<edit_prompt>" not in self.texts.texts.get(row["edit_type"], ""):
                raise UserError(f"prompts: {file}: {key}", f"the type '{row['edit_type']}'", ", ".join(self.texts.texts))
        places = image_files("images", folder, {key: [str(row["id"])] for key, row in rows})
        return [
            Item(
                plain_key(key),
                row["prompt"],
                (places[key],),
                meta={MARK: self.name, "kind": row["edit_type"], "prompt": row["prompt"]},
            )
            for key, row in rows
        ]

    def items(self) -> list[Item]:
        """The edits, in the order of their file."""
        return self._items

    def command(self, item: Item) -> Command:
        """The edited image."""
        return Edit()

    def questions(self, meta: Mapping[str, Any], made: Image.Image, inputs: Sequence[Image.Image]) -> list[Question]:
        """The text of the type with the instruction, the original, and what was made of it."""
        return [Question((self.texts.fill(meta["kind"], instruction=str(meta["prompt"])), *inputs, made))]

    def read(self, answer: str) -> list[int]:
        """Three scores at the ends of lines."""
        return lines_of_scores(answer, 3, 1, 5)

    def judged(self, meta: Mapping[str, Any], replies: Sequence[Reply[Any]]) -> Verdict:
        """The mean of the scores."""
        found = replies[0].value
        value = None if found is None else round(sum(found) / len(found), 2)
        return self.verdict(str(meta["kind"]), value, replies, scores=found or [])
