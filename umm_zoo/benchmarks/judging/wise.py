"""WISE: prompts that hint at what only somebody with knowledge of the world can draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from PIL import Image

from umm_zoo.benchmarks.base import Item, Verdict
from umm_zoo.benchmarks.files import needed, rows_in
from umm_zoo.benchmarks.judging.base import MARK, JudgedBenchmark
from umm_zoo.benchmarks.judging.judge import Judge, Question, Reply
from umm_zoo.benchmarks.judging.reading import labelled_scores
from umm_zoo.errors import UserError, several
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import TextToImage

#: Groups by the ``Category`` of a row.
GROUPS = {
    "Cultural knowledge": "culture",
    "time": "time",
    "Space": "space",
    "Biology": "biology",
    "Physical Knowledge": "physics",
    "Chemistry": "chemistry",
}


class Wise(JudgedBenchmark):
    """WISE_Verified: 1,000 prompts; an image is right or wrong. Its scores are not those of the first WISE (``WiseLegacy``).

    ``overall`` weighs the groups: .40 culture, .12 each of time, space, biology, physics and chemistry. Rows over which the judge
    failed are left out, as in the release. The release's text to the judge, which has no licence, is not shipped: a file with it
    reproduces it, as it stands in its script.

    Args:
        judge: the judge.
        prompts: the release's file, or several.
        judge_prompt: file of texts (``system``, and ``user`` with places ``{prompt}`` and ``{explanation}``; or a text file that is
            the latter) in place of ours.

    Reference: ``vllm_eval.py`` and ``calculate_verified.py`` of Niu et al., 2025, arXiv 2503.07265.
    """

    name = "wise"
    judge_text = "wise_judge.json"
    judge_names = {"user": ("prompt", "explanation")}
    weights = {"culture": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}
    official = "by Qwen3.5-35B without thinking, one score of 0 or 1"
    labels: ClassVar[tuple[str, ...]] = ("Score",)
    best: ClassVar[int] = 1
    place: ClassVar[int] = 0  #: of the label that counts, where it stands several times
    #: Last number of the prompts of each group, and the files of the release.
    last: ClassVar[Mapping[str, int]] = {
        "culture": 400,
        "time": 520,
        "space": 640,
        "biology": 760,
        "physics": 880,
        "chemistry": 1000,
    }
    files: ClassVar[str] = "WISE's data_verified/merge.json"

    def __init__(self, judge: Judge | None = None, prompts: str | list[str] | None = None, judge_prompt: str | None = None) -> None:
        super().__init__(judge, judge_prompt)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts or [""]
        several("prompts", self.prompts)

    @cached_property
    def _items(self) -> list[Item]:
        items = []
        for path in (needed("prompts", file, self.files) for file in self.prompts):
            for _, row in rows_in("prompts", path, ("prompt_id", "Prompt", "Explanation", "Category")):
                group = self._group(row, str(path))
                texts = {"prompt": str(row["Prompt"]), "explanation": str(row["Explanation"])}
                items.append(Item(f"{int(row['prompt_id']):04d}", texts["prompt"], meta={MARK: self.name, "kind": group, **texts}))
        return items

    def _group(self, row: Mapping[str, Any], path: str) -> str:
        """The group of a row; numbers tell the two versions of WISE apart."""
        where, number = f"prompts: {path}: prompt {row['prompt_id']}", row["prompt_id"]
        if (group := GROUPS.get(row["Category"])) is None:
            raise UserError(where, f"the category '{row['Category']}'", ", ".join(GROUPS))
        if not isinstance(number, int) or group != next((own for own, last in self.last.items() if number <= last), None):
            raise UserError(where, f"'{row['Category']}' under this number", self.files, f"this is '{self.name}'")
        return group

    def items(self) -> list[Item]:
        """The prompts, in the order of their files."""
        return self._items

    def command(self, item: Item) -> Command:
        """An image of the prompt."""
        return TextToImage()

    def questions(self, meta: Mapping[str, Any], made: Image.Image, inputs: Sequence[Image.Image]) -> list[Question]:
        """The prompt, what it means, and the image."""
        text = self.texts.fill("user", prompt=meta["prompt"], explanation=meta["explanation"])
        return [Question((text, made), self.texts.texts.get("system", ""))]

    def read(self, answer: str) -> list[int]:
        """The scores behind their labels."""
        return labelled_scores(answer, self.labels, self.best, self.place)

    def score(self, values: Sequence[int]) -> float:
        """Score of an image from those of its labels."""
        return float(values[0])

    def judged(self, meta: Mapping[str, Any], replies: Sequence[Reply[Any]]) -> Verdict:
        """The score of the image."""
        found = replies[0].value
        columns = {} if found is None else dict(zip(self.labels, found, strict=True))
        return self.verdict(str(meta["kind"]), None if found is None else self.score(found), replies, **columns)


class WiseLegacy(Wise):
    """The first WISE: 1,000 prompts, scored (.7 consistency + .2 realism + .1 aesthetic quality) / 2, each from 0 to 2.

    ``overall`` weighs the groups by their prompts: .4 culture, .167 time, .133 space, .1 each of biology, physics, chemistry.

    Reference: ``WISE_legacy`` of the release of Niu et al., 2025, arXiv 2503.07265.
    """

    name = "wise-legacy"
    judge_text = "wise_legacy_judge.json"
    weights = {"culture": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1}
    official = "by GPT-4o-2024-05-13, three scores from 0 to 2"
    labels = ("Consistency", "Realism", "Aesthetic Quality")
    best, place = 2, -1
    last = {"culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000}
    files = "the three files of WISE_legacy/data without 'rewrite', as prompts=[A,B,C]"

    def score(self, values: Sequence[int]) -> float:
        """WiScore."""
        consistency, realism, beauty = values
        return (0.7 * consistency + 0.2 * realism + 0.1 * beauty) / 2
