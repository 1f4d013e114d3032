"""Ledger of what a run read, skipped and repeated, per source, in ``data.json`` of the run folder.

Reads need no bookkeeping: they follow from the position in the order. Skips are written down one by one, by each rank in its own
file, at the moment they are met; a position that is read again after a crash leaves the same line, which counts once.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from umm_zoo.checkpoints.plain_files import strict_json, write_json
from umm_zoo.errors import UserError, printable

_LISTED = 3


@dataclass(unsafe_hash=True)  # not frozen: with a precision such as bf16-true Lightning copies a batch field by field
class Skip:
    """Sample that was not used: its stage (``train`` or ``val``), source, tar and key, why, and its position in the order.

    The key ``*`` and a position below 0 are those of a shard that is left out, or of what is damaged between its samples.

    ``substitute`` was repeated in its place: only where a whole micro-batch was bad, for a rank cannot train on nothing. It is
    empty otherwise: the batch was smaller by this sample.
    """

    stage: str
    source: str
    shard: str
    key: str
    reason: str = field(compare=False)  # the place tells skips apart; a resumed run may word or fill it otherwise
    position: int
    substitute: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The key of the sample with its source and the name of its shard."""
        return f"{self.source}/{os.path.basename(self.shard)}:{self.key}"

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.reason}")


class Ledger:
    """Collection of skips, which stops the run when a rank has more than ``max_skips`` of a stage; rank 0 writes ``data.json``."""

    def __init__(self, max_skips: int, rank: int = 0) -> None:
        self.max_skips, self.rank = max_skips, rank
        self.folder: Path | None = None
        self.skips: dict[Skip, None] = {}  # a set that keeps its order
        self.faults = Counter[str]()
        self.buckets: list[dict[str, Any]] = []  # of the training, see ``buckets.BucketShare``

    def open(self, folder: str | Path) -> None:
        """Write to ``folder`` from now on, what was collected so far included."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for skip in self.skips:
            self._append(skip)
        self.count(_read_faults(self._faults(self.rank)))

    def start_afresh(self, num_ranks: int) -> None:
        """Forget what an earlier run left in the folder; each rank sees to its own file, so none waits for another."""
        if self.folder is None:
            return
        for path in self._files():
            owner = int(path.name.split(".")[2])
            if owner == self.rank or (self.rank == 0 and owner >= num_ranks):
                path.unlink()
        self.faults.clear()
        for skip in self.skips:
            self._append(skip)

    def add(self, skip: Skip) -> bool:
        """Record a skip; return whether it is new. One too many is a ``UserError``: the data is damaged, not a sample."""
        if skip in self.skips:
            return False
        self.skips[skip] = None
        self._append(skip)
        same = [other for other in self.skips if other.stage == skip.stage]
        if len(same) > self.max_skips:
            shown = "; ".join(str(other) for other in same[:_LISTED])
            more = f"; and {len(same) - _LISTED} more" if len(same) > _LISTED else ""
            where = f" (all of them in {self.folder / 'data.json'})" if self.folder else ""
            raise UserError("data.max_skips", f"{len(same)} bad samples", f"{self.max_skips}{where}", shown + more)
        return True

    def count(self, faults: Mapping[str, int]) -> None:
        """Count what went wrong on the way from afar and was tried again."""
        self.faults.update(faults)
        if faults and self.folder is not None:
            write_json(self._faults(self.rank), self.faults)

    def write(self, position: int, train: dict[str, tuple[int, int]], val: dict[str, int]) -> None:
        """Write ``data.json``, of the position of the whole job, and the sizes of the sources.

        Of those of training also how often the order has drawn from them so far.
        """
        if self.folder is None or self.rank != 0:
            return
        skips = self._merged()
        content: dict[str, Any] = {"position": position, "train": {}, "val": {}}
        for name, (samples, drawn) in train.items():
            met = [skip for skip in skips if (skip.stage, skip.source) == ("train", name) and skip.position < position]
            content["train"][name] = {
                "samples": samples,
                "drawn": drawn,
                "read": drawn - sum(skip.position >= 0 for skip in met),
                "skipped": len(met),
                "repeated": max(0, drawn - samples),
                "substituted": sum(bool(skip.substitute) for skip in met),
                "epochs": round(drawn / samples, 4),
                "skips": [asdict(skip) for skip in met],
            }
        for name, size in val.items():
            met = [skip for skip in skips if (skip.stage, skip.source) == ("val", name)]
            content["val"][name] = {"samples": size, "skipped": len(met), "skips": [asdict(skip) for skip in met]}
        if self.buckets:
            content["buckets"] = self.buckets
        if faults := sum((_read_faults(path) for path in self._files()), Counter[str]()):
            content["tried again"] = dict(faults)
        write_json(self.folder / "data.json", content, indent=1)

    def _append(self, skip: Skip) -> None:
        if self.folder is not None:
            with open(self.folder / f"data.skips.{self.rank}.jsonl", "a", encoding="utf-8") as file:
                file.write(strict_json(asdict(skip), ensure_ascii=False) + "\n")

    def _files(self) -> list[Path]:
        kinds = ("data.skips.[0-9]*.jsonl", "data.faults.[0-9]*.json")
        return [] if self.folder is None else [path for kind in kinds for path in sorted(self.folder.glob(kind))]

    def _faults(self, rank: int) -> Path:
        return (self.folder or Path()) / f"data.faults.{rank}.json"

    def _merged(self) -> list[Skip]:
        """The skips of every rank, of this run and of the runs that it resumes, each once, by position."""
        merged = dict(self.skips)
        for path in self._files():
            for line in () if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines():
                try:
                    merged.setdefault(Skip(**json.loads(line)))
                except (json.JSONDecodeError, TypeError):
                    continue  # the last line of a rank that was killed while writing it; the sample will be met again
        return sorted(merged, key=lambda skip: (skip.stage, skip.position))


def _read_faults(path: Path) -> Counter[str]:
    try:
        return Counter(json.loads(path.read_text(encoding="utf-8"))) if path.suffix == ".json" else Counter()
    except (OSError, ValueError, TypeError):
        return Counter()
