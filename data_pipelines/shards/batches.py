"""Raw batches: rows with images in bytes, on their way from a worker to the process that trains."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decoding import BadSampleError, ImageTransform, check_utf8, decode_image, one_sample
from data_pipelines.shards.buffers import BufferReference, ImageBuffers
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.remote import take_faults
from data_pipelines.tasks import SampleTask
from umm_zoo.batch import Batch
from umm_zoo.conversation import Conversation, Task, task_of
from umm_zoo.errors import UserError


@dataclass
class RawBatch:
    """Stacked rows that a worker sends with the skips met on the way, or the error that ends the run.

    ``rows`` are what the ledger would say of each row if it could not be used, without a reason, ``faults`` what was tried
    again on the way.

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
    rows: list[Skip] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    error: UserError | None = None
    faults: Counter[str] = field(default_factory=Counter)
    stands_in: bool = False  # see ``Batch.stands_in``
    ahead: list[RawBatch] | None = None  # see ``Batch.ahead``

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RawBatch:
        """The same rows with every tensor on ``device``; Lightning calls this."""

        def move(images: Any) -> Any:
            return images.to(device, non_blocking=non_blocking) if isinstance(images, Tensor) else images

        extras = {name: move(value) for name, value in self.extras.items()}
        return replace(self, images=move(self.images), targets=move(self.targets), extras=extras)

    def resolve(self, buffers: dict[Any, Tensor]) -> None:
        """Put images in the place of references to a worker's ``buffers``, which the caller keeps from one batch to the next."""
        for name in ("images", "targets"):
            if isinstance(images := getattr(self, name), BufferReference):
                setattr(self, name, images.resolve(buffers))

    def without(self, refused: set[int]) -> RawBatch:
        """The same rows but for some."""
        kept = [row for row in range(len(self.keys)) if row not in refused]
        of_image = torch.tensor([row for row, count in enumerate(self.image_counts) for _ in range(count)])
        own = torch.tensor([int(row) not in refused for row in of_image], dtype=torch.bool)

        def rows(values: list[Any]) -> list[Any]:
            return [values[row] for row in kept]

        def entries(values: Any) -> Any:  # one for each row, or for each image
            if not isinstance(values, Tensor):
                return values
            return values[kept] if len(values) == len(self.keys) else values[own]

        changed: dict[str, Any] = {
            name: rows(getattr(self, name)) for name in ("keys", "conversations", "image_counts", "meta", "tasks", "rows")
        }
        images = self.images[own] if isinstance(self.images, Tensor) and own.any() else None
        extras = {name: entries(values) for name, values in self.extras.items()}
        return replace(self, **changed, images=images, targets=entries(self.targets), extras=extras)

    def outlines(self) -> Batch:
        """The rows with images of their size and without content, on the ``meta`` device."""
        content = {field.name: getattr(self, field.name) for field in fields(Batch)}
        for name in ("images", "targets"):
            if isinstance(images := content[name], Tensor):
                content[name] = torch.empty((len(images), 3, *images.shape[1:3]), device="meta")
        return Batch(**content)

    def own(self) -> RawBatch:
        """The same rows in memory of their own, which no worker writes again."""
        images, targets = (tensor.clone() if isinstance(tensor, Tensor) else tensor for tensor in (self.images, self.targets))
        return replace(self, images=images, targets=targets)

    def batch(self) -> Batch:
        """The rows as a method wants them: floats in [-1, 1], where the bytes are."""
        content = {field.name: getattr(self, field.name) for field in fields(Batch)}
        for name in ("images", "targets"):
            content[name] = None if content[name] is None else to_signal(content[name])
        return Batch(**content)


class RawBatchBuilder:
    """Rows of one raw batch after the other; each image is decoded straight into a buffer."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform
        self._images, self._targets = ImageBuffers(), ImageBuffers()
        self._raw = RawBatch()
        self._has_target: list[bool] = []
        self._extras: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._raw.keys)

    def start(self, size: int, iteration: int = 0) -> None:
        """Begin a raw batch of about ``size`` rows; for ``iteration`` see ``ImageBuffers.start``."""
        for buffers in (self._images, self._targets):
            buffers.start(max(size, buffers.count), iteration)
        self._raw, self._has_target, self._extras = RawBatch(), [], []

    def add(self, row: Skip, task: SampleTask, members: dict[str, bytes], stored: dict[str, Tensor] | None = None) -> None:
        """Parse a sample, decode its images and make it the next row; a ``BadSampleError`` leaves the rows as they were.

        ``row`` names it; the first dimension of ``stored``, precomputed outputs, counts entries.
        """
        images, targets = self._images.count, self._targets.count
        try:
            with one_sample():
                sample = task(row.key, members)
                for turn in sample.conversation:
                    check_utf8(turn["text"])
            with one_sample("image cannot be decoded"):
                for content in sample.images:
                    self._images.put(decode_image(content, self.transform.image_size, self.transform.resize))
                if sample.target is not None:
                    self._targets.put(decode_image(sample.target, self.transform.target_size, self.transform.resize))
        except BadSampleError:
            self._images.drop_to(images)
            self._targets.drop_to(targets)
            raise
        count, has_target, raw = self._images.count - images, sample.target is not None, self._raw
        raw.keys.append(row.name)
        raw.rows.append(row)
        raw.conversations.append(sample.conversation)
        raw.image_counts.append(count)
        raw.meta.append(sample.meta)
        raw.tasks.append(sample.task or task_of(count, has_target))
        self._has_target.append(has_target)
        self._extras.append({**{name: value[None] for name, value in sample.extras.items()}, **(stored or {})})

    def build(self, skips: list[Skip]) -> RawBatch:
        """The rows so far; a ``UserError`` where some have an image to generate and others none."""
        raw, has_target = self._raw, self._has_target
        if any(has_target) and not all(has_target):
            one, other = (raw.keys[has_target.index(there)] for there in (True, False))
            found = f"{one} has an image to generate, {other} of the same batch has none"
            hint = "sources of both kinds cannot be mixed in one run (train them in turn, with after:)"
            raise UserError("data", found, hint=hint)
        extras = {name: torch.cat([row[name] for row in self._extras]) for name in (self._extras[0] if self._extras else ())}
        return replace(
            raw, images=self._images.images(), targets=self._targets.images(), extras=extras, skips=skips, faults=take_faults()
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
