"""The loaders: which places of the order this rank reads, and batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from data_pipelines.shards.buffers import PREFETCH
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.order import Stream, rank_slice
from data_pipelines.shards.reading import Asked, SampleReader, Shipment, Slot
from umm_zoo.errors import MistakeError


class EndlessSlots:
    """The micro-batches of one rank, from a position of the stream on, without end.

    Args:
        stream: the order of the whole job.
        position: asked anew at each start: the position to go on from.
        batch_size: samples of all ranks and micro-batches per optimiser step.
        accumulation: micro-batches per optimiser step.
        num_ranks: ranks that share a batch.
        rank: this rank.
    """

    def __init__(
        self, stream: Stream, position: Callable[[], int], batch_size: int, accumulation: int, num_ranks: int, rank: int
    ) -> None:
        self.stream, self.position, self.batch_size = stream, position, batch_size
        self.slices = [rank_slice(batch_size, accumulation, micro, num_ranks, rank) for micro in range(accumulation)]

    def __iter__(self) -> Iterator[list[Slot]]:
        start = self.position()
        while True:
            samples = self.stream.take(start, start + self.batch_size).tolist()
            for part in self.slices:
                yield [Slot(start + place, samples[place]) for place in range(part.start, part.stop)]
            start += self.batch_size


class SequentialSlots:
    """Every ``num_ranks``-th sample once, in order; a batch never crosses from one source into the next.

    Ranks differ by at most one sample, nothing is padded and nothing repeated.

    Args:
        sizes: samples of each source.
        batch_size: samples per batch and rank.
        num_ranks: ranks that share the sources.
        rank: this rank.

    Raises:
        MistakeError: a rank would get nothing.
    """

    def __init__(self, sizes: list[int], batch_size: int, num_ranks: int, rank: int) -> None:
        if sum(sizes) < num_ranks:
            raise MistakeError(f"data.val: found {sum(sizes)} samples for {num_ranks} ranks; every rank needs at least one")
        self.batches: list[range] = []
        start = 0
        for size in sizes:
            mine = range(start + (rank - start) % num_ranks, start + size, num_ranks)
            self.batches += [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
            start += size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Slot]]:
        for batch in self.batches:
            yield [Slot(sample, sample) for sample in batch]


class _Asking:
    """The slots of a loader, each time it begins with another number: workers that stay must send their rooms again."""

    def __init__(self, slots: EndlessSlots | SequentialSlots) -> None:
        self._slots, self._reading = slots, 0

    def __iter__(self) -> Iterator[Asked]:
        self._reading += 1
        for slots in self._slots:
            yield Asked(slots, self._reading)


class BatchLoader:
    """Yields ``Batch``; tells of skips as they arrive.

    Worker processes only read ahead along a fixed list of places, so their number cannot change what comes out.

    Args:
        reader: reads the places.
        slots: micro-batches of places.
        num_workers: processes that read ahead; 0 reads in this one.
        on_skip: called with each skip, in order.
        packed: yield ``Shipment`` instead, with images in bytes: a quarter of what floats take on the way to a device, where
            ``Shipment.batch`` then makes them floats. Those of workers lie in a room that is used again, see ``ImageRing``.
    """

    def __init__(
        self,
        reader: SampleReader,
        slots: EndlessSlots,
        num_workers: int,
        on_skip: Callable[[Skip], None],
        packed: bool = False,
    ) -> None:
        self.on_skip, self.packed = on_skip, packed
        self._loader: DataLoader[Shipment] = DataLoader(
            reader,
            batch_sampler=_Asking(slots),  # type: ignore[arg-type]  # a batch is one object, not a list
            collate_fn=_as_is,  # type: ignore[arg-type]  # the reader has already stacked the rows
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=PREFETCH if num_workers > 0 else None,
        )

    def __iter__(self) -> Iterator[Any]:
        rooms: dict[Any, Tensor] = {}
        shipment: Shipment
        for shipment in self._loader:
            if shipment.error is not None:
                raise shipment.error
            shipment.take(rooms)
            for skip in shipment.skips:
                self.on_skip(skip)
            if shipment.keys:
                yield shipment if self.packed else shipment.batch()


class SizedBatchLoader(BatchLoader):
    """A ``BatchLoader`` that ends, and knows its number of batches."""

    def __init__(
        self,
        reader: SampleReader,
        slots: SequentialSlots,
        num_workers: int,
        on_skip: Callable[[Skip], None],
        packed: bool = False,
    ) -> None:
        super().__init__(reader, slots, num_workers, on_skip, packed)  # type: ignore[arg-type]
        self._batches = len(slots)

    def __len__(self) -> int:
        return self._batches


def _as_is(shipment: Shipment) -> Shipment:
    return shipment
