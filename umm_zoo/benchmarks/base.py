"""Base class of benchmarks: a metric that knows its own questions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from umm_zoo.batch import Batch
from umm_zoo.experiment.file import Experiment
from umm_zoo.generation.base import Command
from umm_zoo.metrics.rows import RowMetric
from umm_zoo.outputs import Outputs


@dataclass(frozen=True)
class Item:
    """One prompt, instruction or question of a benchmark.

    Args:
        key: its name within the benchmark, and that of its files: letters, digits, ``-`` and ``_``.
        text: what is asked.
        images: files of the images that it is asked about.
        answer: the true answer; empty where there is none to compare with.
        meta: ground truth that the verdict needs, as ``Batch.meta``; plain values, as in JSON.
    """

    key: str
    text: str
    images: tuple[Path, ...] = ()
    answer: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


class Verdict(NamedTuple):
    """What became of one row."""

    record: Sequence[float]  #: what ``values_of`` needs of it, as many numbers for every row
    score: float  #: 1 right, 0 wrong, or between; NaN where the protocol leaves the row out
    kind: str  #: group of the benchmark, by which its card and its interval go
    reason: str = ""  #: in words; empty where there is nothing to say
    columns: Mapping[str, Any] = {}  #: further columns of ``verdicts.csv``, such as what was detected
    again: bool = False  #: whether the same command, called again, looks for another: a judge was out of reach


class Benchmark(RowMetric):
    """Metric that knows its own questions, so that a finished run can be put to them.

    In an experiment it is a metric like others: ``update`` scores the rows of a validation whose ``meta`` has what it needs (shards
    of the items are written by ``python -m data_pipelines.benchmark``). ``python -m umm_zoo.evaluate RUN --benchmark NAME``
    builds it with the settings of the command line, asks the run's method every item, and keeps verdicts beside images.

    Attributes:
        name: on the command line.
        per_item: images made of each item, seed after seed, where the command does not say.
        headline: the score that the card is about, a name that ``values_of`` gives.
        sees_inputs: whether verdicts look at input images, which are opened again for them.
    """

    name: ClassVar[str]
    per_item: ClassVar[int] = 1
    headline: ClassVar[str] = "overall"
    sees_inputs: ClassVar[bool] = True

    @classmethod
    def of_run(cls, experiment: Experiment) -> dict[str, Any]:
        """Settings that a run gives where the command line does not: values and nodes by argument."""
        return {}

    @abstractmethod
    def items(self) -> list[Item]:
        """All items in their order.

        Raises:
            UserError: a file that is needed is missing, or is not what it should be.
        """

    @abstractmethod
    def command(self, item: Item) -> Command:
        """What makes a result of an item: ``TextToImage``, ``Edit``, ``Ask`` …, which asks the method for the capability."""

    @abstractmethod
    def verdicts(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[int, Verdict]]:
        """(row, verdict) of the rows that count: of every row, where rows are items.

        Args:
            outputs: with ``generated`` or ``answers``, as the command makes them.
            batch: ``keys``, ``conversations`` and ``meta`` of the rows; ``images`` are the input images, in an evaluation at the
                size of their files.
        """

    def unit(self, item: Item) -> str:
        """Name of what an interval draws as one: items that count together, such as a pair, share it."""
        return item.key

    def protocol(self) -> dict[str, Any]:
        """What the scores depend on beside the images, for the card: thresholds, the detector and its digest, the judge."""
        return {}

    def warnings(self) -> list[str]:
        """What a reader of the score must know, such as that another judge has made it."""
        return []

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Keep the records of the verdicts: which rows count, the benchmark says itself."""
        self.add_rows(list(self._records_of(outputs, batch)))

    def _records_of(self, outputs: Outputs, batch: Batch) -> Iterator[Any]:
        return (verdict.record for _, verdict in self.verdicts(outputs, batch))
