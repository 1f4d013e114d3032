"""Prompts of a benchmark that stand in the training texts of a run: what was trained on is no test."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from umm_zoo.benchmarks.base import Item
from umm_zoo.benchmarks.results import digest
from umm_zoo.checkpoints.plain_files import strict_json, write_whole, writing
from umm_zoo.errors import UserError
from umm_zoo.training.finished_run import FinishedRun

#: Module that finds them.
FINDER = "data_pipelines.overlap"


def training_overlap(run: FinishedRun, items: Sequence[Item], folder: Path) -> dict[str, Any]:
    """Counts of training texts that contain a prompt, the prompts found, and why nothing is known where that is so.

    Shards are read once; the report is kept in ``folder``. Stages before the run's own have runs of their own, which are not looked
    at.

    Args:
        run: the run.
        items: of the benchmark.
        folder: of this benchmark in the run folder.
    """
    prompts = list(dict.fromkeys(item.text for item in items if item.text.strip()))
    if not prompts:
        return {"unknown": "there are no prompts"}
    finder: Any = importlib.import_module(FINDER)
    try:
        shards = [path for pattern in _patterns(run.experiment.data.get("train")) for path in _expanded(pattern)]
    except UserError as error:
        return {"unknown": f"the training shards are not here ({error.problems[0].where or error.problems[0].found})"}
    if not shards:
        return {"unknown": "the run has no training shards"}
    sizes = [Path(path).stat().st_size if Path(path).is_file() else 0 for path in shards]
    file = folder / f"overlap-{digest([shards, sizes, prompts])}.json"
    if not file.is_file():
        report = finder.find_overlaps(shards, finder.PromptIndex(prompts))
        with writing(folder, "a run folder that can be written"):
            write_whole(file, strict_json(report, indent=1, ensure_ascii=False) + "\n")
    report = json.loads(file.read_text(encoding="utf-8"))
    return {
        "texts": report["texts"],
        "samples": report["samples"],
        "unreadable": len(report["unreadable_shards"]) + report["unreadable_samples"],
        "samples_with_overlap": report["samples_with_overlap"],
        "prompts": [row["prompt"] for row in report["overlaps"]],
        "report": file.name,
    }


def _patterns(node: Any) -> Iterator[str]:
    """Every ``shards`` of the nodes of training data."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "shards":
                yield from [value] if isinstance(value, str) else value
            else:
                yield from _patterns(value)


def _expanded(pattern: str) -> list[str]:
    found: list[str] = importlib.import_module("data_pipelines.shards.expanding").expand([pattern])
    return found


def said(found: Mapping[str, Any], count: int) -> str:
    """One line about it; ``count`` is the number of different prompts."""
    if "unknown" in found:
        return f"overlap with training texts: not known, {found['unknown']}"
    samples = found["samples_with_overlap"]
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in samples.items() if number)
    some = (
        f"{sum(samples.values()):,} of {found['samples']:,} samples ({kinds}) hold {len(found['prompts']):,} of {count:,} prompts"
    )
    return f"overlap with training texts: {some if found['prompts'] else 'none'}"
