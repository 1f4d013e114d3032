"""Raw batches: rows with images in bytes, on their way from a worker to the process that trains."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decoding import BadSampleError, ImageTransform, decode_image
from data_pipelines.shards.buffers import BufferReference, ImageBuffers
from data_pipelines.shards.ledger import Skip
from data_pipelines.tasks import Sample
from umm_zoo.batch import Batch
from umm_zoo.conversation import Conversation, Task, task_of
from umm_zoo.errors import UserError


@dataclass
class RawBatch:
    """Stacked rows that a worker sends with the skips met on the way, or the error that ends the run.

    Shape:
        - images, targets: ``[M, H, W, 3]`` and ``[B, H, W, 3]`` uint8, a quarter of the floats on the way between processes
    """

    keys: list[str] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    images: Tensor | BufferReference | None = None
    image_counts: list[int] = field(default_factory=list)
    targets: Tensor | BufferReference | None = None
    meta: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    extras: dict[str, Tensor] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    error: UserError | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RawBatch:
        """The same rows with every tensor on ``device``; Lightning calls this."""

        def move(images: Any) -> Any:
            return images.to(device, non_blocking=non_blocking) if isinstance(images, Tensor) else images

        extras = {name: move(value) for name, value in self.extras.items()}
        return replace(self, images=move(self.images), targets=move(self.targets), extras=extras)

    def resolve(self, buffers: dict[Any, Tensor]) -> None:
        """Put images in the place of references to a worker's ``buffers``, which the caller keeps from one batch to the next."""
        if isinstance(self.images, BufferReference):
            self.images = self.images.resolve(buffers)
        if isinstance(self.targets, BufferReference):
            self.targets = self.targets.resolve(buffers)

    def batch(self) -> Batch:
        """The rows as a method wants them: floats in [-1, 1], where the bytes are."""
        return Batch(
            keys=self.keys,
            conversations=self.conversations,
            images=to_signal(self.images) if isinstance(self.images, Tensor) else None,
            image_counts=self.image_counts,
            targets=to_signal(self.targets) if isinstance(self.targets, Tensor) else None,
            meta=self.meta,
            tasks=self.tasks,
            extras=self.extras,
        )


class _Row(NamedTuple):
    key: str
    conversation: Conversation
    image_count: int
    has_target: bool
    meta: dict[str, Any]
    task: Task
    extras: dict[str, Tensor]


class RawBatchBuilder:
    """Rows of one raw batch after the other; each image is decoded straight into a buffer."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform
        self._images, self._targets = ImageBuffers(), ImageBuffers()
        self._rows: list[_Row] = []

    def __len__(self) -> int:
        return len(self._rows)

    def start(self, size: int, iteration: int = 0) -> None:
        """Begin a raw batch of about ``size`` rows; for ``iteration`` see ``ImageBuffers.start``."""
        for buffers in (self._images, self._targets):
            buffers.start(max(size, buffers.count), iteration)
        self._rows = []

    def add(self, key: str, sample: Sample, stored: dict[str, Tensor] | None = None) -> None:
        """Decode the images of a sample and make it the next row; a ``BadSampleError`` leaves the rows as they were.

        The first dimension of ``stored``, precomputed outputs, counts entries.
        """
        images, targets = self._images.count, self._targets.count
        try:
            for content in sample.images:
                self._images.put(decode_image(content, self.transform.image_size, self.transform.resize))
            if sample.target is not None:
                self._targets.put(decode_image(sample.target, self.transform.target_size, self.transform.resize))
        except BadSampleError:
            self._images.drop_to(images)
            self._targets.drop_to(targets)
            raise
        extras = {**{name: value[None] for name, value in sample.extras.items()}, **(stored or {})}
        count = self._images.count - images
        has_target = sample.target is not None
        task = sample.task or task_of(count, has_target)
        self._rows.append(_Row(key, sample.conversation, count, has_target, sample.meta, task, extras))

    def build(self, skips: list[Skip]) -> RawBatch:
        """The rows so far; a ``UserError`` where some have an image to generate and others none."""
        has_target = [row.has_target for row in self._rows]
        if any(has_target) and not all(has_target):
            one, other = (self._rows[has_target.index(there)].key for there in (True, False))
            found = f"{one} has an image to generate, {other} of the same batch has none"
            hint = "sources of both kinds cannot be mixed in one run (train them in turn, with after:)"
            raise UserError("data", found, hint=hint)
        names = self._rows[0].extras if self._rows else {}
        return RawBatch(
            keys=[row.key for row in self._rows],
            conversations=[row.conversation for row in self._rows],
            images=self._images.images(),
            image_counts=[row.image_count for row in self._rows],
            targets=self._targets.images(),
            meta=[row.meta for row in self._rows],
            tasks=[row.task for row in self._rows],
            extras={name: torch.cat([row.extras[name] for row in self._rows]) for name in names},
            skips=skips,
        )


def to_signal(images: Tensor) -> Tensor:
    """uint8 images ``[M, H, W, 3]``, as they are decoded, to floats ``[M, 3, H, W]`` in [-1, 1]."""
    planes = images.permute(0, 3, 1, 2)
    if planes.device.type != "cpu":
        return planes.float().sub_(127.5).div_(127.5).contiguous()
    # numpy asks for huge pages and torch does not: a third of the time, which is mostly the first touch of fresh memory
    signal = torch.from_numpy(np.empty(planes.shape, dtype=np.float32))
    for image, out in zip(planes, signal, strict=True):  # one at a time: it stays in the processor's cache for the second pass
        torch.sub(image, 127.5, out=out).div_(127.5)
    return signal
