"""Files of a benchmark: what a run has made of its items, and the verdicts. Several processes write, each into files of its own."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from umm_zoo.benchmarks.base import Item, Verdict
from umm_zoo.checkpoints.folder import PARTIAL
from umm_zoo.checkpoints.plain_files import strict_json, write_json, writing

INSTEAD = "a run folder that can be written"


def digest(value: Any) -> str:
    """Eight hexadecimal digits that stand for a plain value."""
    return hashlib.sha256(strict_json(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Row:
    """An item with a seed: one result, and one verdict.

    Args:
        item: the item.
        seed: of what is made of it.
        inputs: by path of an input image what stands for its content.
    """

    item: Item
    seed: int
    inputs: Mapping[Path, str] = field(default_factory=dict, repr=False)

    @cached_property
    def id(self) -> str:
        """Its name in the files, which changes with what is asked."""
        asked = digest([self.item.text, [self.inputs.get(path, str(path)) for path in self.item.images]])
        return f"{self.item.key}-{self.seed}-{asked}"

    @property
    def file(self) -> str:
        """Name of its image: another prompt under the same key has another."""
        return f"{self.id}.png"


@dataclass(frozen=True)
class Made:
    """What a run has made of a row: an answer, an image (the name of its file), or both."""

    answer: str | None = None
    file: str | None = None


class Lines:
    """Map of rows to JSON, kept as lines of files that only ever grow; a torn last line, as a kill leaves it, does not count.

    Args:
        folder: of the files.
        name: what they hold.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._own = folder / f"{name}-{socket.gethostname()}-{os.getpid()}.jsonl"
        if self._own.is_file():  # in a container every process may have the same number
            with self._own.open("a", encoding="utf-8") as stream:
                stream.write("\n")

    def read(self) -> dict[str, dict[str, Any]]:
        """Everything that all processes have written so far, by the rows' ids; of a row's lines the latest."""
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(self.folder.glob(f"{self.name}-*.jsonl"), key=lambda file: (file.stat().st_mtime_ns, file.name)):
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):  # texts may hold other ends of lines
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                found[row.pop("id")] = row
        return found

    def add(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write some, and flush them."""
        with writing(self.folder, INSTEAD), self._own.open("a", encoding="utf-8") as stream:
            stream.write("".join(strict_json({"id": id, **row}, ensure_ascii=False) + "\n" for id, row in rows.items()))


class Results:
    """Results and verdicts of a benchmark on a run.

    What was made lies in a folder named after what it depends on (the weights, settings of generation), so that another detector
    or judge finds the same images; verdicts lie in one named after that and their own settings.

    Args:
        folder: of this benchmark, inside the run folder.
        generation: what the results depend on beside the rows, plain values.
        scoring: what the verdicts depend on beside the results, plain values.
    """

    def __init__(self, folder: Path, generation: Mapping[str, Any], scoring: Mapping[str, Any]) -> None:
        self.images = folder / f"made-{digest(generation)}"
        self.path = folder / f"scored-{digest([generation, scoring])}"
        with writing(folder, INSTEAD):
            for place in (self.images, self.path):
                place.mkdir(parents=True, exist_ok=True)
        self._made, self._judged = Lines(self.images, "made"), Lines(self.path, "verdicts")

    def made(self) -> dict[str, Made]:
        """What is there already; an image whose file is missing is not."""
        rows = {id: Made(row["answer"], row["file"]) for id, row in self._made.read().items()}
        return {id: made for id, made in rows.items() if made.file is None or (self.images / made.file).is_file()}

    def verdicts(self) -> dict[str, Verdict]:
        """Those that are there already."""
        rows = {id: {name: row[name] for name in Verdict._fields if name in row} for id, row in self._judged.read().items()}
        return {id: Verdict(**{**row, "score": _number(row["score"])}) for id, row in rows.items()}

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        """Keep what the method itself says of how it generates, plain values."""
        with writing(self.images, INSTEAD):
            write_json(self.images / "settings.json", settings, indent=1)

    def settings(self) -> dict[str, Any]:
        """What was kept; empty where nothing was."""
        file = self.images / "settings.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def image_sizes(self, made: Iterable[Made]) -> dict[str, int]:
        """How many images there are of each size, "height x width"."""
        counts = Counter[str]()
        for own in made:
            if own.file is not None:
                with Image.open(self.images / own.file) as image:
                    counts[f"{image.height} x {image.width}"] += 1
        return dict(counts.most_common())

    def add_made(self, rows: Sequence[Row], answers: Sequence[str | None], images: Sequence[Image.Image | None]) -> list[Made]:
        """Keep results, images first."""
        kept = {}
        for row, answer, image in zip(rows, answers, images, strict=True):
            if image is not None:
                partial = self.images / f"{row.file}{PARTIAL}-{os.getpid()}"
                with writing(self.images, INSTEAD):
                    image.save(partial, "PNG")
                    partial.replace(self.images / row.file)
            kept[row.id] = Made(answer, None if image is None else row.file)
        self._made.add({id: {"answer": made.answer, "file": made.file} for id, made in kept.items()})
        return list(kept.values())

    def add_verdicts(self, verdicts: Iterator[tuple[Row, Verdict]]) -> None:
        """Keep verdicts."""
        self._judged.add({row.id: {**verdict._asdict(), "columns": dict(verdict.columns)} for row, verdict in verdicts})


def _number(score: float | None) -> float:
    return float("nan") if score is None else score
