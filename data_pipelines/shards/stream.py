"""Stream of raw batches from whole shards, one part per rank and worker, shuffled within a buffer."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from data_pipelines.decoding import BadSampleError, ImageTransform
from data_pipelines.shards.batches import RawBatch, RawBatchBuilder
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.order import permutation
from data_pipelines.shards.sequential import read_samples
from data_pipelines.shards.sources import ShardSource
from umm_zoo.errors import UserError


class Progress(NamedTuple):
    """Progress of a stream: its epoch, and the shards of it whose samples have all been delivered."""

    epoch: int = 0
    shards: int = 0


_BEGIN = Progress()


@dataclass
class StreamedBatch(RawBatch):
    """Raw batch with the progress of its worker; None at the end of what is not endless."""

    progress: Progress | None = None
    worker: int = 0


class _Held(NamedTuple):
    shard: int
    source: str
    path: str
    key: str
    members: dict[str, bytes]


class ShardStream(IterableDataset[StreamedBatch]):
    """Raw batches of one rank, read from whole shards.

    Epoch ``e`` permutes the shards by (seed, e); stream ``s`` of S (ranks x workers) reads every S-th of them, so that every sample
    of the epoch is delivered once, by one rank.

    Args:
        stage: ``train`` goes on with the next epoch, without end; ``val`` reads one epoch in the order on disk.
        shards: (source, path) of each shard.
        ranks: (number of ranks, this rank).
        buffer: samples among which the next one of a training is drawn; 1 keeps the order on disk.
        start: where to go on: an epoch, and how many of its shards (in its order) are done.
    """

    def __init__(
        self,
        stage: str,
        shards: Sequence[tuple[str, str]],
        sources: dict[str, ShardSource],
        transform: ImageTransform,
        batch_size: int,
        ranks: tuple[int, int] = (1, 0),
        seed: int = 0,
        buffer: int = 1,
        start: Progress = _BEGIN,
    ) -> None:
        self.stage, self.shards, self.sources = stage, list(shards), sources
        self.batch_size, self.ranks, self.seed, self.start = batch_size, ranks, seed, start
        self.endless = stage == "train"
        self.buffer = buffer if self.endless else 1
        self._builder = RawBatchBuilder(transform)

    def __iter__(self) -> Iterator[StreamedBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        num_ranks, rank = self.ranks
        try:
            yield from self._deliver(rank * workers + worker, num_ranks * workers, worker)
        except UserError as error:
            yield StreamedBatch(error=error)

    def _deliver(self, stream: int, streams: int, worker: int) -> Iterator[StreamedBatch]:
        skips: list[Skip] = []
        self._builder.start(self.batch_size)
        for progress, made in self._samples(stream, streams):
            if isinstance(made, Skip):
                skips.append(made)
            ended = made is None and not self.endless
            if len(self._builder) == self.batch_size or (ended and (len(self._builder) or skips)):
                raw = self._builder.build(skips)
                yield StreamedBatch(**vars(raw), progress=progress if self.stage == "train" else None, worker=worker)
                skips = []
                self._builder.start(self.batch_size)

    def _samples(self, stream: int, streams: int) -> Iterator[tuple[Progress, str | Skip | None]]:
        """The progress after each sample that became a row (its key) or was skipped; None at the end of an epoch."""
        epoch, offset = self.start
        while True:
            order = permutation(len(self.shards), self.seed, epoch).tolist() if self.buffer > 1 else range(len(self.shards))
            mine = order[offset:][stream::streams]
            delivered, reason = 0, "they are empty"
            for finished, made in self._shuffled([self.shards[number] for number in mine], epoch, stream):
                if isinstance(made, Skip):
                    reason = str(made)
                else:
                    delivered += 1
                yield Progress(epoch, offset + finished * streams), made
            if not delivered and not offset and self.endless:  # or it would look for one for ever
                found = f"no usable sample in the {len(mine)} shards that rank {self.ranks[1]} reads"
                raise UserError(f"data.{self.stage}", found, f"at least one ({reason})")
            epoch, offset = epoch + 1, 0
            yield Progress(epoch, 0), None
            if not self.endless:
                return

    def _shuffled(self, shards: list[tuple[str, str]], epoch: int, stream: int) -> Iterator[tuple[int, str | Skip]]:
        """Samples drawn from a buffer, with the number of leading shards of which none is still to come."""
        random = np.random.RandomState([self.seed & 0xFFFFFFFF, epoch, stream])
        held: list[_Held] = []
        waiting: Counter[int] = Counter()
        number = 0

        def drawn() -> tuple[int, str | Skip]:
            one = held.pop(int(random.randint(len(held))) if self.buffer > 1 else 0)
            waiting[one.shard] -= 1
            finished = min((n for n, count in waiting.items() if count), default=number)
            return min(finished, number), self._add(one)

        for number, (source, path) in enumerate(shards):
            try:
                for key, members in read_samples(path):
                    held.append(_Held(number, source, path, key, members))
                    waiting[number] += 1
                    if len(held) >= self.buffer:
                        yield drawn()
            except (tarfile.TarError, OSError, ValueError) as error:
                yield number, Skip(self.stage, source, path, "*", f"the rest of the shard cannot be read: {error}", -1)
        number = len(shards)
        while held:
            yield drawn()

    def _add(self, one: _Held) -> str | Skip:
        """Make a sample the next row of the batch; its key, or why it is skipped."""
        try:
            name = f"{one.source}/{PurePosixPath(one.path).name}:{one.key}"
            self._builder.add(name, self.sources[one.source].task(one.key, one.members))
            return name
        except BadSampleError as error:
            return Skip(self.stage, one.source, one.path, one.key, str(error), -1)
