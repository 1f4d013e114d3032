"""GenEval++: prompts with several objects, attributes, places and numbers; a judge goes through a checklist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from PIL import Image

from umm_zoo.benchmarks.base import Item, Verdict
from umm_zoo.benchmarks.files import SHIPPED, needed, rows_in
from umm_zoo.benchmarks.judging.base import MARK, JudgedBenchmark
from umm_zoo.benchmarks.judging.judge import Judge, Question, Reply
from umm_zoo.benchmarks.judging.reading import parse_json
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import TextToImage


class GenEvalPlusPlus(JudgedBenchmark):
    """GenEval++ (Echo-4o): 280 prompts of 7 kinds; right is what has all of its checklist and looks like a photograph.

    ``overall`` is the mean of the accuracies of the kinds, ``mean`` that over all images. A call that failed counts as wrong, as in
    the release. The text to the judge is the release's own.

    Args:
        judge: the judge.
        prompts: file of prompts; None takes the release's, which ships.
        judge_prompt: file with the texts ``system`` and ``user`` (places ``{prompt}`` and ``{checklist}``) in place of the
            release's.

    Reference: ``Eval-gpt-4.1-geneval++.py`` of Ye et al., 2025, arXiv 2508.09987.
    """

    name = "geneval++"
    judge_text = "genevalpp_judge.json"
    judge_names = {"user": ("prompt", "checklist")}
    failures_count = True
    official = "by GPT-4.1 at temperature 0"

    def __init__(self, judge: Judge | None = None, prompts: str | None = None, judge_prompt: str | None = None) -> None:
        super().__init__(judge, judge_prompt)
        self.prompts = prompts

    @cached_property
    def _items(self) -> list[Item]:
        path = needed("prompts", self.prompts or str(SHIPPED / "genevalpp.jsonl"), "the release's Geneval++.jsonl")
        rows = [row for _, row in rows_in("prompts", path, ("tag", "prompt", "include"))]
        return [
            Item(f"{number:04d}", row["prompt"], meta={MARK: self.name, "kind": row["tag"], **row})
            for number, row in enumerate(rows, 1)
        ]

    def items(self) -> list[Item]:
        """The prompts, in the order of their file."""
        return self._items

    def command(self, item: Item) -> Command:
        """An image of the prompt."""
        return TextToImage()

    def questions(self, meta: Mapping[str, Any], made: Image.Image, inputs: Sequence[Image.Image]) -> list[Question]:
        """The prompt, its checklist, and the image."""
        text = self.texts.fill("user", prompt=str(meta["prompt"]).strip(), checklist=checklist(meta))
        return [Question((text, made), self.texts.texts.get("system", ""), "JPEG")]

    def read(self, answer: str) -> dict[str, Any]:
        """``correct`` and ``reason`` of the JSON."""
        return parse_json(answer, {"correct": int})

    def judged(self, meta: Mapping[str, Any], replies: Sequence[Reply[Any]]) -> Verdict:
        """Right where ``correct`` is 1."""
        found = replies[0].value
        value = None if found is None else float(found["correct"] == 1)
        return self.verdict(str(meta["tag"]), value, replies)._replace(
            reason=replies[0].failure if found is None else str(found.get("reason", ""))
        )


def checklist(meta: Mapping[str, Any]) -> str:
    """What an image must show, a line per object, in the release's words."""
    lines = ["This image should contain:"]
    for wanted in meta.get("include", ()):
        count, noun = wanted.get("count", 1), str(wanted["class"])
        attributes = [f"{wanted['color']}-colored"] if wanted.get("color") else []
        attributes += [str(wanted["size"])] if wanted.get("size") else []
        named = " ".join([*attributes, str(count), noun + "s" * (count > 1)])
        place = f"located in the {wanted['region']} part of the image" if wanted.get("region") else "present in the image"
        lines.append(f"- {named} {place}.")
    for unwanted in meta.get("exclude", ()):
        count, noun = unwanted.get("count", 1), str(unwanted["class"])
        lines.append(f"- No more than {count - 1} {noun + 's' * (count > 1)} should appear.")
    return "\n".join(lines)
