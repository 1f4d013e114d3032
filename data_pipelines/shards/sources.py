"""Sources: shards of one kind and what their samples mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from data_pipelines.shards.addresses import shown
from data_pipelines.shards.expanding import expand
from data_pipelines.shards.index import ShardIndex, load_index
from data_pipelines.shards.indexing import ShardUserError
from data_pipelines.tasks import Conversations, SampleTask
from umm_zoo.errors import UserError, Weight, note


class ShardSource:
    """Source of samples: shards of one kind, and the task of their samples. Nothing is opened before the run starts.

    Args:
        shards: a folder, a glob, a ``{000..015}`` range, an http(s), s3 or gs address, or a list of these.
        task: turns raw members into a sample.
        weight: share of the training stream among the sources (any scale). None, for every source, mixes by size: every sample of
            every source exactly once per epoch.
    """

    def __init__(self, shards: str | Sequence[str], task: SampleTask | None = None, weight: Weight | None = None) -> None:
        if not shards:
            raise UserError("", "no shards", "a folder, a glob, a range, an address, or a list of these")
        self.shards: str | list[str] = shards if isinstance(shards, str) else list(shards)
        self.task = task if task is not None else Conversations()
        if weight is not None and weight < 0:
            raise UserError("", f"weight {weight}", "a number from 0 on")
        self.weight = weight

    def open(self, name: str, measured: bool = False) -> OpenSource:
        """Find the shards and read their indexes (making those that are missing); shards that cannot be used are left out.

        Indexes of an earlier version are made again where they are to have measures, after a note.

        Raises:
            UserError: none is left, or what the experiment names is not there.
        """
        opened, errors = OpenSource(name, self.task, []), list[ShardUserError]()
        told = list[str]()

        def tell() -> None:
            if not told:
                note(f"source '{name}': its indexes of an earlier version say no sizes of images; they are made again once")
            told.append(name)

        for path in expand(self.shards):
            try:
                index = load_index(path, tell if measured else None)
            except ShardUserError as error:
                errors.append(error)
                [problem] = error.problems
                opened.damage[shown(path)] = f"shard left out: {replace(problem, where='')}"
            else:
                opened.indexes.append(index)
                if index.damage:
                    opened.damage[index.shown] = "; ".join(index.damage)
        if not opened.indexes:
            raise errors[0]
        return opened


@dataclass
class OpenSource:
    """Source whose indexes have been read.

    ``damage`` names shards that are left out and what is damaged between the samples of others, each with the reason.
    """

    name: str
    task: SampleTask
    indexes: list[ShardIndex]
    damage: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Samples per shard."""
        return [len(index) for index in self.indexes]

    def __len__(self) -> int:
        return sum(self.sizes)


@contextmanager
def in_data() -> Iterator[None]:
    """Put ``data:`` in front of the shards and keys that user errors name, for they stand below it in an experiment."""
    try:
        yield
    except UserError as error:
        error.problems = [
            problem if f"{problem.where}.".startswith(("data.", "data: ")) else replace(problem, where=f"data: {problem.where}")
            for problem in error.problems
        ]
        raise
