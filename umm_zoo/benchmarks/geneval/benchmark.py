"""GenEval: whether generated images show the objects, numbers, colours and places of their prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umm_zoo.batch import Batch
from umm_zoo.benchmarks.base import Benchmark, Item, Verdict
from umm_zoo.benchmarks.geneval.colours import AttributeNamer, CLIPColours, Subject
from umm_zoo.benchmarks.geneval.detector import Detector
from umm_zoo.benchmarks.geneval.mask2former import Mask2Former
from umm_zoo.benchmarks.geneval.metadata import SHIPPED, check_wanted, read_metadata
from umm_zoo.errors import REFUSALS, UserError, locating, printable
from umm_zoo.generation.base import Command
from umm_zoo.generation.generating import TextToImage
from umm_zoo.metrics.geneval_rule import COLOURS, Found, GenEvalRule
from umm_zoo.metrics.rows import NAME_WORDS, digest, name_to_words, rates_by_name
from umm_zoo.outputs import Outputs

#: Scores beside those of the tasks.
MEANS = ("overall", "images", "prompts")


class GenEval(Benchmark):
    """GenEval (Ghosh et al., 2023, arXiv 2310.11513), by the official rule (``GenEvalRule``).

    ``overall`` is the mean over tasks of the share of right images; beside it each task, ``images`` (share of all images) and
    ``prompts`` (share of prompts with a right image among theirs). As a metric it counts the rows whose ``meta`` has ``tag`` and
    ``include`` as the rows of the prompts file.

    Args:
        prompts: a file like the official ``evaluation_metadata.jsonl``; None is the official one, which ships with the package.
        detector: None is ``Mask2Former.from_pretrained()``, which the numbers of papers come from.
        colours: None is ``CLIPColours.from_pretrained()``, likewise; it is loaded where a prompt asks for a colour.
        rule: other thresholds, as options of the official script.
        kinds: count rows of these tasks only.

    Raises:
        UserError: see ``read_metadata``.
    """

    name = "geneval"
    per_item = 4
    reads = ("generated",)
    scores = (*MEANS, "*")

    def __init__(
        self,
        prompts: str | Path | None = None,
        detector: Detector | None = None,
        colours: AttributeNamer | None = None,
        rule: GenEvalRule | None = None,
        kinds: list[str] | None = None,
    ) -> None:
        super().__init__(kinds)
        self.prompts = prompts
        self.detector = detector or Mask2Former.from_pretrained()
        self.colours = colours
        self.rule = rule or GenEvalRule()

    def items(self) -> list[Item]:
        """The prompts of the file, under their numbers; ``meta`` is the row."""
        rows = read_metadata(self.prompts or SHIPPED, self.detector.names, self._words())
        if any("color" in clause for row in rows for clause in row.get("include", ())):
            self._namer()  # now, and not after hours
        return [Item(f"{number:05d}", row["prompt"], meta=row) for number, row in enumerate(rows)]

    def command(self, item: Item) -> Command:
        """``text-to-image``."""
        return TextToImage()

    def protocol(self) -> dict[str, Any]:
        """Detector and what names colours, with hashes of their weights, and the thresholds."""
        colours = {} if self.colours is None else {"colours": self.colours.digest()}
        return {"detector": self.detector.digest(), **colours, **asdict(self.rule)}

    def wanted(self, meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What the image of a row must show, as in the prompts file; None where the row is not GenEval's."""
        return meta if "include" in meta and "tag" in meta else None

    def verdicts(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[int, Verdict]]:
        """Of the rows with generated images; detector and namer see all of them at once.

        Raises:
            UserError: a row asks for what the detector does not know.
        """
        images = outputs.generated
        rows = {row: wanted for row, meta in enumerate(batch.meta) if (wanted := self.wanted(meta)) and self._counts(wanted)}
        if images is None or not rows:
            return
        for row, wanted in rows.items():
            try:
                check_wanted(wanted, self.detector.names, self._words())
            except UserError as error:
                error.row = row
                raise
        least = min(self.rule.threshold, self.rule.counting_threshold)
        seen = dict(zip(rows, self.detector([images[row] for row in rows], least), strict=True))
        kept = {row: self.rule.kept(seen[row], wanted["tag"]) for row, wanted in rows.items()}
        asked = {(row, name): own for row, wanted in rows.items() for name, own in self.rule.coloured(kept[row], wanted).items()}
        subjects = [Subject(images[row], name, found) for (row, name), own in asked.items() for found in own]
        words = iter(self._namer()(subjects) if subjects else ())
        colours = {place: [next(words) for _ in own] for place, own in asked.items()}
        for row, wanted in rows.items():
            right, reason = self.rule.judge(kept[row], wanted, lambda name, own, row=row: colours[row, name][: len(own)])  # type: ignore[misc]
            told = {name: colours[place, name] for place, name in colours if place == row}
            prompt = json.dumps(
                [wanted.get("prompt") or batch.keys[row], *(wanted.get(part) for part in ("tag", "include", "exclude"))]
            )
            record = [int(right), *name_to_words(_task(wanted)), digest(prompt)]
            yield row, Verdict(record, float(right), _task(wanted), reason, _columns(kept[row], told))

    def _words(self) -> tuple[str, ...]:
        """Colours that can be told."""
        return COLOURS if self.colours is None else self.colours.colours

    def _namer(self) -> AttributeNamer:
        """What names colours, loaded."""
        if self.colours is None:
            with locating(place="colours", refusals=REFUSALS):
                self.colours = CLIPColours.from_pretrained().to(self.device)
        return self.colours

    def _counts(self, wanted: Mapping[str, Any]) -> bool:
        return self.kinds is None or wanted["tag"] in self.kinds

    def values_of(self, records: Tensor) -> dict[str, Tensor]:
        """``overall``, ``images``, ``prompts`` and one rate per task."""
        right = records[:, 0]
        rates = rates_by_name(right, records[:, 1 : 1 + NAME_WORDS])
        _, prompt = torch.unique(records[:, -1], return_inverse=True)
        any_right = torch.zeros(int(prompt.max()) + 1, dtype=right.dtype, device=right.device).scatter_reduce(
            0, prompt, right, "amax"
        )
        overall = torch.stack(list(rates.values())).mean()
        return {"overall": overall, "images": right.double().mean(), "prompts": any_right.double().mean(), **rates}


def _task(wanted: Mapping[str, Any]) -> str:
    """The tag, as the name of a score."""
    if (task := printable(str(wanted["tag"]))) in MEANS:
        raise UserError("", f"the tag '{task}'", f"another one: {', '.join(MEANS)} are means over tags")
    return task


def _columns(kept: Mapping[str, list[Found]], colours: Mapping[str, list[str]]) -> dict[str, str]:
    """What was detected, box by box with its score, and the colours that were told."""
    boxes = {
        name: [[*(round(float(edge), 1) for edge in one.box), round(one.score, 4)] for one in own] for name, own in kept.items()
    }
    return {"detected": json.dumps(boxes), "colours": json.dumps(colours) if colours else ""}
