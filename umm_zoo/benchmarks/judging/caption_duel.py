"""Captions of a run against another model's, put to a judge: Unified-Bench's second protocol."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.benchmarks.base import Benchmark, Item, Verdict
from umm_zoo.benchmarks.files import csv_rows, needed, rows_in
from umm_zoo.benchmarks.judging.base import JUDGES, MARK
from umm_zoo.benchmarks.judging.captions import DECIDED, both_orders, outcome, verdict
from umm_zoo.benchmarks.judging.judge import Judge
from umm_zoo.benchmarks.unified_bench import image_items
from umm_zoo.errors import UserError
from umm_zoo.generation.answering import Ask
from umm_zoo.generation.options import whole
from umm_zoo.generation.tensors import to_pil
from umm_zoo.metrics.rows import required
from umm_zoo.outputs import Outputs

_OUTCOMES = ("win", "tie", "loss", "invalid")


class Describe(Ask):
    """Description of an image, of as many words as a long caption has."""

    options = {**Ask.options, "max_new_tokens": whole("longest caption", 1, 100_000, 512)}


class CaptionDuel(Benchmark):
    """Captions of a run compared with another model's of the same images, by a judge in both orders.

    Only a choice that survives the swap is a win or a loss, see ``compare_captions``. ``win_rate`` is wins and half of the ties
    over the images for which both answers have a verdict; ``failed`` are the others. ``first_share`` is the share of choices for
    the caption shown first: .5 is a judge without a habit. The question is ours, for the paper states its criteria alone.

    Args:
        judge: the judge.
        images: folder of images.
        other: the other model's captions: ``verdicts.csv`` of an evaluation on the same folder (``unified-bench`` or this), or
            JSONL with a ``key`` (the name of an image's file without its suffix) and a ``caption``.
        prompt: what the run is asked of each image.

    Raises:
        UserError: there is no judge.
    """

    name = "caption-duel"
    headline = "win_rate"
    reads = ("answers",)
    scores: tuple[str, ...] | None = ("win_rate", "wins", "ties", "losses", "failed", "first_share")

    def __init__(
        self,
        judge: Judge | None = None,
        images: str | None = None,
        other: str | None = None,
        prompt: str = "Describe the image in detail.",
    ) -> None:
        super().__init__()
        if judge is None:
            raise UserError("judge", f"no judge for {self.name}", JUDGES)
        self.judge, self.images, self.other, self.prompt = judge, images, other, prompt

    @cached_property
    def _others(self) -> dict[str, str]:
        path = needed("other", self.other, "the other model's captions: verdicts.csv of an evaluation, or JSONL of key and caption")
        if path.suffix.lower() == ".csv":
            return {row["key"]: row["answer"] for row in csv_rows("other", path, ("key", "answer"))}
        return {str(row["key"]): str(row["caption"]) for _, row in rows_in("other", path, ("key", "caption"))}

    @cached_property
    def _items(self) -> list[Item]:
        items = image_items(self.images)
        if missing := [item.key for item in items if not self._others.get(item.key, "").strip()]:
            found = f"no caption of {missing[0]}; {len(missing)} of {len(items)} are missing"
            raise UserError(f"other: {self.other}", found, "one for every image of the folder")
        metas = [{MARK: self.name, "other": self._others[item.key]} for item in items]
        return [Item(item.key, self.prompt, item.images, meta=meta) for item, meta in zip(items, metas, strict=True)]

    def items(self) -> list[Item]:
        """One per image, in alphabetical order."""
        return self._items

    def command(self, item: Item) -> Describe:
        """A caption."""
        return Describe()

    def verdicts(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[int, Verdict]]:
        """Win, tie or loss of each caption."""
        rows = [row for row in self.chosen(batch) if batch.meta[row].get(MARK) == self.name]
        answers = required(outputs, "answers", self) if rows else []
        captions = [(to_pil(batch.images_of(row)[0]), answers[row], str(batch.meta[row]["other"])) for row in rows]
        replies = self.judge.ask_all([question for own in captions for question in both_orders(*own)], verdict)
        for row, straight, swapped in zip(rows, replies[::2], replies[1::2], strict=True):
            decided = outcome(straight.value, swapped.value)
            choices = [reply.value for reply in (straight, swapped) if reply.value in ("first", "second")]
            record = [_OUTCOMES.index(decided), choices.count("first"), len(choices)]
            score = {"win": 1.0, "tie": 0.5, "loss": 0.0}.get(decided, float("nan"))
            reason = decided if decided in ("tie", *DECIDED.values()) else straight.failure or swapped.failure
            columns = {"other": batch.meta[row]["other"], "own first": straight.text, "own second": swapped.text}
            yield row, Verdict(record, score, "", reason, columns, straight.unreached or swapped.unreached)

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """The rate and the numbers that it is made of."""
        wins, ties, losses, failed = (torch.sum(records[:, 0] == place).double() for place in range(len(_OUTCOMES)))
        first, choices = records[:, 1].sum().double(), records[:, 2].sum()
        rate = (wins + ties / 2) / (wins + ties + losses)
        share = first / choices if choices else torch.full_like(first, 0.5)
        return {"win_rate": rate, "wins": wins, "ties": ties, "losses": losses, "failed": failed, "first_share": share}

    def protocol(self) -> dict[str, Any]:
        """The judge, and what the run was asked."""
        return {"judge": dict(self.judge.identity), "judge_prompt": {"text": "our words for the paper's criteria"}}
