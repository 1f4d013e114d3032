"""Loaders: which positions of the order this rank reads, and batches made of them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data_pipelines.shards.batches import RawBatch
from data_pipelines.shards.buffers import PREFETCH
from data_pipelines.shards.order import Stream, rank_slice
from data_pipelines.shards.reading import BatchRequest, SamplePosition, SampleReader
from data_pipelines.shards.sources import in_data
from umm_zoo.errors import UserError
from umm_zoo.objectives.step import whole_steps

#: The tokenizers library's variable that says whether it uses threads.
_THREADS = "TOKENIZERS_PARALLELISM"


class TrainingBatchSampler:
    """Micro-batches of one rank, without end, from the position in the job's stream that is current at each start.

    ``batch_size`` counts the samples of all ranks and all micro-batches (``accumulation``) per optimiser step.
    """

    def __init__(
        self, stream: Stream, position: Callable[[], int], batch_size: int, accumulation: int, num_ranks: int, rank: int
    ) -> None:
        self.stream, self.position, self.batch_size = stream, position, batch_size
        self.slices = [rank_slice(batch_size, accumulation, micro, num_ranks, rank) for micro in range(accumulation)]

    def __iter__(self) -> Iterator[list[SamplePosition]]:
        start = self.position()
        while True:
            samples = self.stream.take(start, start + self.batch_size).tolist()
            for part in self.slices:
                yield [SamplePosition(start + place, samples[place]) for place in range(part.start, part.stop)]
            start += self.batch_size


class ValidationBatchSampler:
    """Every ``num_ranks``-th sample once, in order; a batch (per rank) never crosses from one source into the next.

    Ranks differ by at most one sample, nothing is padded and nothing repeated; a ``UserError`` where one would get nothing. Of a
    ``limit`` of batches, the samples of a single rank's first so many are shared out: the same for any number of ranks.
    """

    def __init__(self, sizes: list[int], batch_size: int, num_ranks: int, rank: int, limit: int | None = None) -> None:
        left, kept = limit, list(sizes)
        if left is not None:
            for source, size in enumerate(sizes):
                kept[source] = min(size, left * batch_size)
                left -= -(-kept[source] // batch_size)
        if sum(kept) < num_ranks and limit != 0:
            raise UserError("data.val", f"{sum(kept)} samples for {num_ranks} ranks", "at least one for each")
        self.batches: list[range] = []
        for start, size in zip(accumulate([0, *sizes]), kept, strict=False):
            mine = range(start + (rank - start) % num_ranks, start + size, num_ranks)
            self.batches += [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SamplePosition]]:
        for batch in self.batches:
            yield [SamplePosition(sample, sample) for sample in batch]


class _Requests:
    """Requests of a batch sampler, each time it begins with another number: workers that stay must send their buffers again."""

    def __init__(self, sampler: TrainingBatchSampler | ValidationBatchSampler) -> None:
        self._sampler, self._iteration = sampler, 0

    def __iter__(self) -> Iterator[BatchRequest]:
        self._iteration += 1
        for positions in self._sampler:
            yield BatchRequest(positions, self._iteration)


def reading_loader(
    reader: SampleReader, sampler: TrainingBatchSampler | ValidationBatchSampler, num_workers: int
) -> DataLoader[RawBatch]:
    """Torch's loader over a reader; workers only read ahead along a fixed list of positions: their number changes nothing."""
    return DataLoader(
        reader,
        batch_size=None,  # the reader stacks the rows of a request itself
        sampler=_Requests(sampler),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCH if num_workers > 0 else None,
        worker_init_fn=alone(num_workers),
    )


def alone(num_workers: int) -> Callable[[int], None]:
    """What a worker begins with: it tokenises without threads.

    The tokenizers library has threads of its own, which a forked process does not inherit: it would wait for them for ever. It
    warns of that wherever a process that has used them is forked, so this process goes without too, unless the user says otherwise.
    """
    if num_workers:
        os.environ.setdefault(_THREADS, "false")
    return _begin_alone


def _begin_alone(worker: int) -> None:
    os.environ[_THREADS] = "false"


def _tell(done: Any, queues: list[Any]) -> None:
    """Tell workers to end."""
    done.set()
    for queue in queues:
        if not queue._closed:
            queue.put(None)


class BatchLoader:
    """Batches of raw batches, each of which goes through ``on_batch`` first.

    Args:
        size: number of batches; None where they have no end, or nobody knows.
        packed: yield raw batches, with images in bytes: a quarter of what floats take on the way to a device, where
            ``RawBatch.batch`` then makes them floats. Those of workers lie in a buffer that is used again, see ``ImageBuffers``.
        pinned: yield them in page-locked memory, for a copy to CUDA that nobody waits for.
        per_step: micro-batches of an optimiser step, which are read together, see ``Batch.ahead``; 1 is none.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        on_batch: Callable[[RawBatch], RawBatch],
        size: int | None = None,
        packed: bool = False,
        per_step: int = 1,
        pinned: bool = False,
    ) -> None:
        self._loader, self._on_batch, self._size, self.packed, self.per_step = loader, on_batch, size, packed, per_step
        self.pinned = pinned
        self._queues: list[Any] = []

    def __len__(self) -> int:
        if self._size is None:  # as torch's own loader of an endless data set
            raise TypeError("this loader has no length")
        return self._size

    def __iter__(self) -> Iterator[Any]:
        batches = (raw if self.packed else raw.batch() for raw in self._raw())
        return batches if self.per_step == 1 else whole_steps(batches, self.per_step)

    def _started(self) -> Iterator[RawBatch]:
        """An iterator of the loader, whose workers are told to end where this one is collected as garbage.

        By then the iterator could not: its queues would have been closed before, nobody would tell the workers, and each would be
        waited for five seconds, in the midst of whatever runs then.
        """
        iterator = iter(self._loader)
        if isinstance(iterator, _MultiProcessingDataLoaderIter) and iterator._index_queues is not self._queues:
            self._queues = iterator._index_queues
            weakref.finalize(self, _tell, iterator._workers_done_event, self._queues).atexit = False
        return iterator

    def _raw(self) -> Iterator[RawBatch]:
        buffers: dict[Any, Tensor] = {}
        for raw in self._started():
            if raw.error is not None:
                with in_data():
                    raise raw.error
            raw.resolve(buffers)
            raw = self._on_batch(raw)
            if raw.keys and self.pinned:
                yield raw.pin_memory()
            elif raw.keys:
                yield raw.own() if self.per_step > 1 else raw  # a step holds more batches than a worker has buffers
