"""What a loader's worker does: from positions in the order to a shipment of decoded samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data_pipelines.archive import RangeReader
from data_pipelines.decoding import BadSampleError, Resize, decode_picture, to_signal
from data_pipelines.ledger import Skip
from data_pipelines.shard_cache import ShardCache
from data_pipelines.shard_index import ShardIndex
from data_pipelines.shared_pictures import PictureRing, Stack, stack_pictures
from data_pipelines.stored import StoredOutputs
from data_pipelines.tasks import Task
from umm_zoo.batch import Batch, Conversation
from umm_zoo.mistakes import MistakeError

#: Samples tried in place of a micro-batch that has no good sample, before the run is stopped.
_TRIES = 64


class Slot(NamedTuple):
    """A place in the order and the sample that stands there."""

    position: int
    sample: int


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
    """One decoded sample; pictures are ``[H, W, 3]`` uint8, a quarter of the floats on the way between processes."""

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
    images: Tensor | None = None
    image_counts: list[int] = field(default_factory=list)
    targets: Tensor | None = None
    meta: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, Tensor] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    error: Exception | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Shipment:
        """The same rows with every tensor on ``device``; Lightning calls this."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        extras = {name: value.to(device, non_blocking=non_blocking) for name, value in self.extras.items()}
        return replace(self, images=move(self.images), targets=move(self.targets), extras=extras)

    def batch(self) -> Batch:
        """The rows as a method wants them: floats in [-1, 1], where the bytes are."""
        return Batch(
            keys=self.keys,
            conversations=self.conversations,
            images=None if self.images is None else to_signal(self.images),
            image_counts=self.image_counts,
            targets=None if self.targets is None else to_signal(self.targets),
            meta=self.meta,
            extras=self.extras,
        )


class SampleReader(Dataset[Shipment]):
    """Random access to the samples of several sources, numbered through.

    Args:
        stage: ``train`` or ``val``, for the ledger.
        sources: opened sources.
        image_size: edge of input pictures.
        target_size: edge of pictures to be drawn.
        resize: how pictures become square.
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
        self._stack_images, self._stack_targets = PictureRing(), PictureRing()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    def __getitems__(self, slots: list[Slot]) -> Shipment:
        """Read a whole micro-batch; torch's loader hands over all its places at once."""
        try:
            return self._shipment(slots)
        except MistakeError as error:  # sent as a value: a worker's raise would bury the line under a traceback
            return Shipment(error=error)

    def place(self, sample: int) -> tuple[OpenSource, ShardIndex, int]:
        """Source, shard and number within the shard of a sample."""
        shard = bisect_right(self._ends, sample)
        source, index = self.shards[shard]
        return source, index, sample - (self._ends[shard] - len(index))

    def read(self, sample: int) -> Row:
        """Read and decode one sample.

        Raises:
            BadSampleError: it cannot be used.
            StaleIndexError: its shard is not what its index says.
            MistakeError: its shard cannot be read any more.
        """
        source, index, number = self.place(sample)
        key = f"number {number}"
        try:
            key = index.key(number)
            members = self._files.members(index, number)
        except OSError as error:
            raise MistakeError(
                f"{index.path}: found no sample '{key}', for the shard cannot be read any more ({error.strerror or error}); "
                f"accepted are the shards that the run began with (source '{source.name}')"
            ) from error
        read = source.task(key, members)
        return Row(
            key=f"{source.name}/{PurePosixPath(index.path).name}:{key}",
            conversation=read.conversation,
            images=[decode_picture(content, self.image_size, self.resize) for content in read.images],
            target=None if read.target is None else decode_picture(read.target, self.target_size, self.resize),
            meta=read.meta,
            extras=read.extras,
            stored={name: value for kept in self.stored for name, value in kept.read(self._files, index, number).items()},
        )

    def _shipment(self, slots: list[Slot]) -> Shipment:
        rows, skips = [], []
        for slot in slots:
            try:
                rows.append(self.read(slot.sample))
            except BadSampleError as error:
                skips.append(self._skip(slot, str(error)))
        if not rows and self.substitute:
            rows = [self._another(slots[0].sample)]
            skips = [Skip(**{**vars(skip), "substitute": rows[0].key}) for skip in skips]
        return stack(rows, skips, self._stack_images, self._stack_targets)

    def _another(self, sample: int) -> Row:
        """The next good sample after ``sample``, in the order on disk."""
        for step in range(1, _TRIES + 1):
            try:
                return self.read((sample + step) % len(self))
            except BadSampleError:
                continue
        source, index, number = self.place(sample)
        raise MistakeError(
            f"{index.path}: found {_TRIES} samples in a row that are bad, from '{index.key(number)}' on (source '{source.name}')"
        )

    def _skip(self, slot: Slot, reason: str) -> Skip:
        source, index, number = self.place(slot.sample)
        return Skip(self.stage, source.name, index.path, index.key(number), reason, slot.position)


def stack(
    rows: list[Row], skips: list[Skip], stack_images: Stack = stack_pictures, stack_targets: Stack = stack_pictures
) -> Shipment:
    """Rows as one shipment.

    Raises:
        MistakeError: some have a picture to draw and others none.
    """
    with_target = [row for row in rows if row.target is not None]
    if with_target and len(with_target) < len(rows):
        without = next(row for row in rows if row.target is None)
        raise MistakeError(
            f"data: {with_target[0].key} has a picture to draw, {without.key} of the same batch has none; "
            "sources of both kinds cannot be mixed in one run (train them in turn, with after:)"
        )
    names = rows[0].extras if rows else {}
    images = [picture for row in rows for picture in row.images]
    return Shipment(
        keys=[row.key for row in rows],
        conversations=[row.conversation for row in rows],
        images=stack_images(images) if images else None,
        image_counts=[len(row.images) for row in rows],
        targets=stack_targets([row.target for row in with_target if row.target is not None]) if with_target else None,
        meta=[row.meta for row in rows],
        extras={
            **{name: torch.stack([row.extras[name] for row in rows]) for name in names},
            **{name: torch.cat([row.stored[name] for row in rows]) for name in (rows[0].stored if rows else {})},
        },
        skips=skips,
    )
