"""Reader of samples by their number, as a loader's worker runs it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from data_pipelines.decoding import BadSampleError
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.batches import RawBatch, RawBatchBuilder
from data_pipelines.shards.cache import ShardCache
from data_pipelines.shards.index import ShardIndex
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.sources import OpenSource
from data_pipelines.shards.stored import StoredOutputs
from data_pipelines.transforms.image_transform import ImageTransform
from umm_zoo.backbones.preparation import Preparation
from umm_zoo.errors import UserError

#: Samples tried in place of a micro-batch that has no good sample, before the run is stopped.
TRIES = 64


class SamplePosition(NamedTuple):
    """Position in the order, and the sample that stands there."""

    position: int
    sample: int


class BatchRequest(NamedTuple):
    """Request for a micro-batch, with how often its loader has begun."""

    positions: list[SamplePosition]
    iteration: int = 0


class SampleReader(Dataset[RawBatch]):
    """Random access to the samples of several sources, numbered through.

    With ``substitute`` another sample stands in for a batch that has no good one (training: a rank cannot step on nothing), without
    weight in the step, which is then the same however it is shared out;
    ``stored`` are outputs of frozen parts that were computed beforehand, ``prepare`` is run on every batch.
    """

    def __init__(
        self,
        stage: str,
        sources: Sequence[OpenSource],
        transform: ImageTransform,
        substitute: bool,
        cache: ShardCache | None = None,
        stored: Sequence[StoredOutputs] = (),
        prepare: Preparation | None = None,
    ) -> None:
        self.stage, self.substitute = stage, substitute
        self.shards = [(source, index) for source in sources for index in source.indexes]
        self._ends = np.cumsum([len(index) for _, index in self.shards]).tolist()
        self._files, self._stored = RangeReader(cache), list(stored)
        self._builder = RawBatchBuilder(transform, prepare)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def __getitem__(self, request: BatchRequest) -> RawBatch:
        """The raw batch of a request."""
        try:
            return self._read(*request)
        except UserError as error:  # sent as a value: a worker's raise would bury the line under a traceback
            return RawBatch(error=error)

    def place(self, sample: int) -> tuple[OpenSource, ShardIndex, int]:
        """Source, shard and number within the shard of a sample."""
        shard = bisect_right(self._ends, sample)
        source, index = self.shards[shard]
        return source, index, sample - (self._ends[shard] - len(index))

    def _read(self, positions: list[SamplePosition], iteration: int) -> RawBatch:
        self._builder.start(len(positions), iteration)
        skips: list[Skip] = []
        for position, sample in positions:
            try:
                self._add(sample, position)
            except BadSampleError as error:
                source, index, number = self.place(sample)
                skips.append(Skip(self.stage, source.name, index.shown, index.key(number), str(error), position))
        if not len(self._builder) and self.substitute:
            key = self._add_substitute(positions[0].sample)
            skips = [replace(skip, substitute=key) for skip in skips]
            return replace(self._builder.build(skips), stands_in=True)
        return self._builder.build(skips)

    def _add(self, sample: int, position: int) -> str:
        """Read and decode one sample; returns its row's key."""
        source, index, number = self.place(sample)
        key = f"number {number}"
        try:
            key = index.key(number)
            members = self._files.members(index, number)
        except OSError as error:
            found = f"no sample '{key}', for the shard cannot be read any more ({error.strerror or error})"
            expected = f"the shards that the run began with (source '{source.name}')"
            raise UserError(index.shown, found, expected) from error
        stored = {name: value for kept in self._stored for name, value in kept.read(self._files, index, number).items()}
        row = Skip(self.stage, source.name, index.shown, key, "", position)
        self._builder.add(row, source.task, members, stored)
        return row.name

    def _add_substitute(self, sample: int) -> str:
        """Add the next good sample after ``sample``, in the order on disk."""
        for step in range(1, TRIES + 1):
            try:
                return self._add((sample + step) % len(self), -1)
            except BadSampleError:
                continue
        source, index, number = self.place(sample)
        bad = f"{TRIES} samples in a row that are bad, from '{index.key(number)}' on (source '{source.name}')"
        raise UserError(index.shown, bad, "a good one among them")
