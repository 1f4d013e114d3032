"""What a loader's worker does: from positions in the order to a shipment of decoded samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data_pipelines.decoding import BadSampleError, Resize, decode_image, to_signal
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.buffers import ImageRing, Lent, stack_images
from data_pipelines.shards.cache import ShardCache
from data_pipelines.shards.index import ShardIndex
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.stored import StoredOutputs
from data_pipelines.tasks import Task
from umm_zoo.batch import Batch, Conversation
from umm_zoo.errors import MistakeError

#: Samples tried in place of a micro-batch that has no good sample, before the run is stopped.
_TRIES = 64


class Slot(NamedTuple):
    """A place in the order and the sample that stands there."""

    position: int
    sample: int


class Asked(NamedTuple):
    """A micro-batch that a loader asks for, and how often that loader has begun."""

    slots: list[Slot]
    reading: int


@dataclass
class OpenSource:
    """A source whose indexes have been read."""

    name: str
    task: Task
    indexes: list[ShardIndex]

    @property
    def sizes(self) -> list[int]:
        """Samples per shard."""
        return [len(index) for index in self.indexes]

    def __len__(self) -> int:
        return sum(self.sizes)


@dataclass
class Row:
    """One decoded sample; images are ``[H, W, 3]`` uint8, a quarter of the floats on the way between processes."""

    key: str
    conversation: Conversation
    images: list[NDArray[np.uint8]]
    target: NDArray[np.uint8] | None
    meta: dict[str, Any]
    extras: dict[str, Tensor]
    stored: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Shipment:
    """What a worker sends: rows, stacked, and the skips met on the way; or the error that ends the run."""

    keys: list[str] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    images: Tensor | Lent | None = None
    image_counts: list[int] = field(default_factory=list)
    targets: Tensor | Lent | None = None
    meta: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, Tensor] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    error: Exception | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Shipment:
        """The same rows with every tensor on ``device``; Lightning calls this."""

        def move(images: Tensor | Lent | None) -> Tensor | Lent | None:
            return images.to(device, non_blocking=non_blocking) if isinstance(images, Tensor) else images

        extras = {name: value.to(device, non_blocking=non_blocking) for name, value in self.extras.items()}
        return replace(self, images=move(self.images), targets=move(self.targets), extras=extras)

    def take(self, rooms: dict[Any, Tensor]) -> None:
        """Find the images that a worker has lent in its ``rooms``, which the caller keeps from one shipment to the next."""
        if isinstance(self.images, Lent):
            self.images = self.images.taken(rooms)
        if isinstance(self.targets, Lent):
            self.targets = self.targets.taken(rooms)

    def batch(self) -> Batch:
        """The rows as a method wants them: floats in [-1, 1], where the bytes are."""
        return Batch(
            keys=self.keys,
            conversations=self.conversations,
            images=to_signal(self.images) if isinstance(self.images, Tensor) else None,
            image_counts=self.image_counts,
            targets=to_signal(self.targets) if isinstance(self.targets, Tensor) else None,
            meta=self.meta,
            extras=self.extras,
        )


class SampleReader(Dataset[Shipment]):
    """Random access to the samples of several sources, numbered through.

    Args:
        stage: ``train`` or ``val``, for the ledger.
        sources: opened sources.
        image_size: edge of input images.
        target_size: edge of images to be drawn.
        resize: how images become square.
        substitute: put another sample in place of a shipment that has no good one (training: a rank cannot step on nothing).
        cache: where whole remote shards are kept.
        stored: outputs of frozen parts that were computed beforehand.
    """

    def __init__(
        self,
        stage: str,
        sources: Sequence[OpenSource],
        image_size: int,
        target_size: int,
        resize: Resize,
        substitute: bool,
        cache: ShardCache | None = None,
        stored: Sequence[StoredOutputs] = (),
    ) -> None:
        self.stage, self.substitute = stage, substitute
        self.image_size, self.target_size, self.resize = image_size, target_size, resize
        self.shards = [(source, index) for source in sources for index in source.indexes]
        self._ends = np.cumsum([len(index) for _, index in self.shards]).tolist()
        self._files, self.stored = RangeReader(cache), list(stored)
        self._images, self._targets = ImageRing(), ImageRing()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def __getitems__(self, asked: Asked | list[Slot]) -> Shipment:
        """Read a whole micro-batch; torch's loader hands over all its places at once."""
        slots, reading = asked if isinstance(asked, Asked) else (asked, 0)
        try:
            return self._shipment(slots, reading)
        except MistakeError as error:  # sent as a value: a worker's raise would bury the line under a traceback
            return Shipment(error=error)

    def place(self, sample: int) -> tuple[OpenSource, ShardIndex, int]:
        """Source, shard and number within the shard of a sample."""
        shard = bisect_right(self._ends, sample)
        source, index = self.shards[shard]
        return source, index, sample - (self._ends[shard] - len(index))

    def read(self, sample: int) -> Row:
        """Read and decode one sample; ``Row`` holds its images.

        Raises:
            BadSampleError: it cannot be used.
            StaleIndexError: its shard is not what its index says.
            MistakeError: its shard cannot be read any more.
        """
        images: list[NDArray[np.uint8]] = []
        targets: list[NDArray[np.uint8]] = []
        row = self._read(sample, images.append, targets.append)
        return replace(row, images=images, target=targets[0] if targets else None)

    def _read(self, sample: int, image: Callable[[NDArray[np.uint8]], None], target: Callable[[NDArray[np.uint8]], None]) -> Row:
        """A sample whose images are handed over one by one, as they are decoded."""
        source, index, number = self.place(sample)
        key = f"number {number}"
        try:
            key = index.key(number)
            members = self._files.members(index, number)
        except OSError as error:
            raise MistakeError(
                f"{index.path}: found no sample '{key}', for the shard cannot be read any more ({error.strerror or error}); "
                f"expected the shards that the run began with (source '{source.name}')"
            ) from error
        read = source.task(key, members)
        for content in read.images:
            image(decode_image(content, self.image_size, self.resize))
        if read.target is not None:
            target(decode_image(read.target, self.target_size, self.resize))
        return Row(
            key=f"{source.name}/{PurePosixPath(index.path).name}:{key}",
            conversation=read.conversation,
            images=[],
            target=None,
            meta=read.meta,
            extras=read.extras,
            stored={name: value for kept in self.stored for name, value in kept.read(self._files, index, number).items()},
        )

    def _shipment(self, slots: list[Slot], reading: int) -> Shipment:
        rows: list[Row] = []
        counts: list[int] = []
        drawn: list[bool] = []
        skips: list[Skip] = []
        for ring in (self._images, self._targets):
            ring.start(max(len(slots), ring.count), reading)

        def add(sample: int) -> None:
            images, targets = self._images.count, self._targets.count
            try:
                rows.append(self._read(sample, self._images.put, self._targets.put))
            except BadSampleError:
                self._images.drop_to(images)
                self._targets.drop_to(targets)
                raise
            counts.append(self._images.count - images)
            drawn.append(self._targets.count > targets)

        for slot in slots:
            try:
                add(slot.sample)
            except BadSampleError as error:
                skips.append(self._skip(slot, str(error)))
        if not rows and self.substitute:
            self._substitute(slots[0].sample, add)
            skips = [Skip(**{**vars(skip), "substitute": rows[0].key}) for skip in skips]
        return _shipment(rows, counts, drawn, self._images.images(), self._targets.images(), skips)

    def _substitute(self, sample: int, add: Callable[[int], None]) -> None:
        """Add the next good sample after ``sample``, in the order on disk."""
        for step in range(1, _TRIES + 1):
            try:
                return add((sample + step) % len(self))
            except BadSampleError:
                continue
        source, index, number = self.place(sample)
        raise MistakeError(
            f"{index.path}: found {_TRIES} samples in a row that are bad, from '{index.key(number)}' on (source '{source.name}')"
        )

    def _skip(self, slot: Slot, reason: str) -> Skip:
        source, index, number = self.place(slot.sample)
        return Skip(self.stage, source.name, index.path, index.key(number), reason, slot.position)


def stack(rows: list[Row], skips: list[Skip]) -> Shipment:
    """Rows that hold their images as one shipment.

    Raises:
        MistakeError: some have an image to draw and others none.
    """
    images = stack_images([image for row in rows for image in row.images])
    targets = stack_images([row.target for row in rows if row.target is not None])
    return _shipment(rows, [len(row.images) for row in rows], [row.target is not None for row in rows], images, targets, skips)


def _shipment(
    rows: list[Row],
    counts: list[int],
    drawn: list[bool],
    images: Tensor | Lent | None,
    targets: Tensor | Lent | None,
    skips: list[Skip],
) -> Shipment:
    if any(drawn) and not all(drawn):
        one, other = rows[drawn.index(True)], rows[drawn.index(False)]
        raise MistakeError(
            f"data: {one.key} has an image to draw, {other.key} of the same batch has none; "
            "sources of both kinds cannot be mixed in one run (train them in turn, with after:)"
        )
    names = rows[0].extras if rows else {}
    return Shipment(
        keys=[row.key for row in rows],
        conversations=[row.conversation for row in rows],
        images=images,
        image_counts=counts,
        targets=targets,
        meta=[row.meta for row in rows],
        extras={
            **{name: torch.stack([row.extras[name] for row in rows]) for name in names},
            **{name: torch.cat([row.stored[name] for row in rows]) for name in (rows[0].stored if rows else {})},
        },
        skips=skips,
    )
