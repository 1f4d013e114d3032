"""Raw batches: rows with images in bytes, on their way from a worker to the process that trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decoding import BadSampleError, Decoded, check_utf8, decode_images, one_sample
from data_pipelines.shards.buffers import BufferReference, ImageBuffers, PackedImages, new_memory
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.remote import take_faults
from data_pipelines.tasks import Sample, SampleTask
from data_pipelines.transforms.image_transform import ImageTransform, SizedResize
from umm_zoo.backbones.preparation import Preparation, Prepared
from umm_zoo.batch import Batch, Crop
from umm_zoo.conversation import Conversation, Task, repeat_markers, task_of
from umm_zoo.errors import UserError


@dataclass
class RawBatch:
    """Rows that a worker sends with the skips met on the way, or the error that ends the run.

    ``rows`` are what the ledger would say of each row if it could not be used, without a reason, ``faults`` what was tried
    again on the way. Images are in bytes, a quarter of the floats on the way between processes.
    """

    keys: list[str] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    images: PackedImages | BufferReference | None = None
    image_counts: list[int] = field(default_factory=list)
    targets: PackedImages | BufferReference | None = None
    meta: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    extras: dict[str, Tensor | list[Tensor]] = field(default_factory=dict)
    has_target: list[bool] = field(default_factory=list)
    again: list[bool] = field(default_factory=list)  # whether the image to generate is the one that is shown
    crops: list[Crop | None] = field(default_factory=list)
    entries: dict[str, list[int]] = field(default_factory=dict)
    rows: list[Skip] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    error: UserError | None = None
    faults: Counter[str] = field(default_factory=Counter)
    prepared: Prepared | None = None  # what the method had prepared of it
    stands_in: bool = False  # see ``Batch.stands_in``
    ahead: list[RawBatch] | None = None  # see ``Batch.ahead``

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> RawBatch:
        """The same rows with every tensor on ``device``; Lightning calls this, and CUDA is not waited for unless so said."""
        alone = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return self._map(lambda tensor: tensor.to(device, non_blocking=alone))

    def pin_memory(self) -> RawBatch:
        """The same rows in page-locked memory of their own, which CUDA reads while the processor goes on."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> RawBatch:
        def moved(values: Any) -> Any:
            if isinstance(values, list):
                return [moved(value) for value in values]
            if isinstance(values, PackedImages):
                return replace(values, pixels=move(values.pixels))
            return move(values) if isinstance(values, Tensor) else values

        extras, prepared = {name: moved(value) for name, value in self.extras.items()}, self.prepared
        if prepared is not None and prepared.images is not None:
            prepared = replace(prepared, images=prepared.images.map(move))
        return replace(self, images=moved(self.images), targets=moved(self.targets), extras=extras, prepared=prepared)

    def resolve(self, buffers: dict[Any, Tensor]) -> None:
        """Put images in the place of references to a worker's ``buffers``, which the caller keeps from one batch to the next."""
        for name in ("images", "targets"):
            if isinstance(images := getattr(self, name), BufferReference):
                setattr(self, name, images.resolve(buffers))

    def refuse_mixed(self, hint: str) -> None:
        """Raise a ``UserError`` where some rows have an image to generate and others none."""
        if len(set(self.has_target)) > 1:
            one, other = (self.keys[self.has_target.index(there)] for there in (True, False))
            raise UserError("data", f"{one} has an image to generate, {other} of the same batch has none", hint=hint)

    def without(self, refused: set[int]) -> RawBatch:
        """The same rows but for some."""

        def rows(values: list[Any]) -> list[Any]:
            return [value for row, value in enumerate(values) if row not in refused]

        def of_rows(values: Any, counts: Sequence[int]) -> Any:
            """Those of some entries, of which each row has so many."""
            kept = [row not in refused for row, count in enumerate(counts) for _ in range(count)]
            if isinstance(values, list):
                return [value for value, keep in zip(values, kept, strict=True) if keep]
            return values.only(kept) if isinstance(values, PackedImages) else values[torch.tensor(kept, dtype=torch.bool)]

        changed: dict[str, Any] = {
            name: rows(getattr(self, name))
            for name in ("keys", "conversations", "image_counts", "meta", "tasks", "has_target", "again", "crops", "rows")
        }
        ones = [1] * len(self.keys)
        return replace(
            self,
            **changed,
            images=of_rows(self.images, self.image_counts) if sum(changed["image_counts"]) else None,
            targets=of_rows(self.targets, self.has_target) if any(changed["has_target"]) else None,
            extras={name: of_rows(values, self.entries.get(name, ones)) for name, values in self.extras.items()},
            entries={name: rows(counts) for name, counts in self.entries.items()},
            prepared=self._prepared_without(refused),
        )

    def _prepared_without(self, refused: set[int]) -> Prepared | None:
        if self.prepared is None or self.prepared.images is None:
            return self.prepared
        kept = [row not in refused for row, count in enumerate(self.image_counts) if count]
        return replace(self.prepared, images=self.prepared.images.only(kept))

    def outlines(self) -> Batch:
        """The rows with images of their size and without content, on the ``meta`` device."""
        return self._batch(lambda packed: [torch.empty((3, *size), device="meta") for size in packed.sizes])

    def own(self) -> RawBatch:
        """The same rows in memory of their own, which no worker writes again."""
        packed = (self.images, self.targets)
        images, targets = (images.own() if isinstance(images, PackedImages) else images for images in packed)
        return replace(self, images=images, targets=targets)

    def batch(self) -> Batch:
        """The rows as a method wants them: floats in [-1, 1], where the bytes are."""
        batch = self._batch(to_signals)
        if self.prepared is not None and self.prepared.images is not None:
            self.prepared.images.keep_for(batch.images, batch.image_counts)
        return batch

    def _batch(self, made: Callable[[PackedImages], list[Tensor]]) -> Batch:
        """The rows with what is ``made`` of their images, ``[3, H, W]`` each."""
        content = {field.name: getattr(self, field.name) for field in fields(Batch)}
        images, targets = (made(packed) if isinstance(packed, PackedImages) else [] for packed in (self.images, self.targets))
        own, first, asked = iter(targets), 0, list[Tensor | None]()
        repeats = self.again or [False] * len(self.keys)
        for count, there, again in zip(self.image_counts, self.has_target, repeats, strict=True):
            target = next(own) if there else None
            asked.append(images[first] if again else target)  # the same tensor: who has encoded one has encoded both
            first += count
        return Batch(**{**content, "images": images, "targets": asked})


class RawBatchBuilder:
    """Rows of one raw batch after the other; each image is decoded straight into a buffer."""

    def __init__(self, transform: ImageTransform, prepare: Preparation | None = None) -> None:
        self.transform, self.prepare = transform, prepare
        self._images, self._targets = ImageBuffers(), ImageBuffers()
        self._raw = RawBatch()
        self._extras: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._raw.keys)

    def start(self, size: int, iteration: int = 0) -> None:
        """Begin a raw batch of about ``size`` rows; for ``iteration`` see ``ImageBuffers.start``."""
        for buffers in (self._images, self._targets):
            buffers.start(max(size, buffers.count), iteration)
        self._raw, self._extras = RawBatch(), []

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
                parts = [len(_put(content, self.transform.inputs, self._images).images) for content in sample.images]
                crop = None if sample.target is None else self._put_target(sample.target)
        except BadSampleError:
            self._images.drop_to(images)
            self._targets.drop_to(targets)
            raise
        has_target, raw = sample.target is not None, self._raw
        raw.keys.append(row.name)
        raw.rows.append(row)
        raw.conversations.append(repeat_markers(sample.conversation, parts))
        raw.image_counts.append(sum(parts))
        raw.meta.append(sample.meta)
        raw.tasks.append(sample.task or task_of(len(parts), has_target))
        raw.has_target.append(has_target)
        raw.again.append(has_target and parts == [1] and self._is_again(sample))
        raw.crops.append(crop)
        self._extras.append({**{name: value[None] for name, value in sample.extras.items()}, **(stored or {})})

    def _is_again(self, sample: Sample) -> bool:
        """Whether the image to generate is the one that is shown, in the same size and cut."""
        own, asked = self.transform.inputs, self.transform.targets
        alike = own.size == asked.size and type(own.resize) is type(asked.resize) and vars(own.resize) == vars(asked.resize)
        return alike and sample.images[0] is sample.target

    def _put_target(self, content: bytes) -> Crop:
        """Decode an image to generate; what was cut away of it."""
        policy = self.transform.targets
        decoded = _put(content, policy, self._targets)
        if len(decoded.images) > 1:
            found = f"{type(policy.resize).__name__}, which makes several images of one"
            raise UserError("data.target_resize", found, "a policy that makes one image of each that is to be generated")
        return policy.crop(*decoded.full)

    def build(self, skips: list[Skip]) -> RawBatch:
        """The rows so far."""
        names = list(self._extras[0]) if self._extras else []
        counts = {name: [len(row[name]) for row in self._extras] for name in names}
        raw = replace(
            self._raw,
            images=self._images.packed(),
            targets=self._targets.packed(),
            extras={name: _joined([row[name] for row in self._extras]) for name in names},
            entries={name: own for name, own in counts.items() if set(own) != {1}},
            skips=skips,
            faults=take_faults(),
        )
        prepared = None if self.prepare is None or not raw.keys else _prepared(raw, self.prepare)
        return replace(raw, images=self._images.images(), targets=self._targets.images(), prepared=prepared)


def _prepared(raw: RawBatch, prepare: Preparation) -> Prepared | None:
    """What is prepared of the rows; None where that fails: the step, which then does it, says why in the process that trains."""
    images = [image.numpy() for run in raw.images.runs() for image in run] if isinstance(raw.images, PackedImages) else []
    try:
        return prepare(raw.outlines(), images)
    except Exception:
        return None


def _joined(rows: list[Tensor]) -> Tensor | list[Tensor]:
    """The entries of all rows, stacked where they are of one shape."""
    filled = [row for row in rows if len(row)] or rows[:1]
    return torch.cat(filled) if len({row.shape[1:] for row in filled}) == 1 else [entry for row in filled for entry in row]


def _put(content: bytes, policy: SizedResize, buffers: ImageBuffers) -> Decoded:
    """Decode the images made of one straight into a buffer."""
    decoded = decode_images(content, policy.size, policy.resize)
    for image in decoded.images:
        buffers.put(image)
    return decoded


def to_signal(images: Tensor, out: Tensor | None = None) -> Tensor:
    """uint8 images ``[M, H, W, 3]``, as they are decoded, to floats ``[M, 3, H, W]`` in [-1, 1], in ``out`` where it is given."""
    planes = images.permute(0, 3, 1, 2)
    signal = _new_floats(planes.numel(), images.device).view(planes.shape) if out is None else out
    if planes.device.type != "cpu":
        return signal.copy_(planes).sub_(127.5).div_(127.5)
    for image, own in zip(planes, signal, strict=True):  # one at a time: it stays in the processor's cache for the second pass
        torch.sub(image, 127.5, out=own).div_(127.5)
    return signal


def to_signals(packed: PackedImages) -> list[Tensor]:
    """Images of any sizes as floats ``[3, H, W]`` in [-1, 1], one behind the other in one piece of memory, in a pass per run."""
    signals, first = list[Tensor](), 0
    floats = _new_floats(packed.pixels.numel(), packed.pixels.device)
    for run in packed.runs():
        shape = (len(run), 3, *run.shape[1:3])
        out = floats[first : (first := first + run.numel())].view(shape)
        signals += to_signal(run, out)
    return signals


def _new_floats(count: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(count, device=device)
    return new_memory(count, np.float32)
