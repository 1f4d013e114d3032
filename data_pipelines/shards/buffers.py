"""Buffers of decoded images of any sizes that worker processes share with the process that trains."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

#: Batches that torch's loader keeps ahead per worker.
PREFETCH = 2
#: One batch is being written, two lie ready, the trainer holds one ahead and one is being turned into floats: none of them may
#: share its buffer. One more for safety.
NUM_BUFFERS = PREFETCH + 4


#: Height and width, in pixels.
Size = tuple[int, int]


@dataclass  # not frozen: with a precision such as bf16-true Lightning copies a batch field by field
class PackedImages:
    """Images of any ``sizes`` in bytes, one behind the other in one piece of memory.

    Shape:
        - pixels: ``[sum of 3 H W]`` uint8; each image is ``[H, W, 3]``
    """

    pixels: Tensor
    sizes: list[Size]

    def __len__(self) -> int:
        return len(self.sizes)

    def runs(self) -> Iterator[Tensor]:
        """Images of one size that follow each other, as ``[M, H, W, 3]``, run after run, without a copy."""
        first = 0
        for (height, width), run in groupby(self.sizes):
            shape = (len(list(run)), height, width, 3)
            yield self.pixels[first : (first := first + num_bytes([shape[1:3]]) * shape[0])].view(shape)

    def only(self, kept: Sequence[bool]) -> PackedImages:
        """Those that are ``kept``, of which at least one is."""
        lengths = [num_bytes([size]) for size in self.sizes]
        parts = self.pixels.split(lengths)
        pixels = torch.cat([part for part, keep in zip(parts, kept, strict=True) if keep])
        return PackedImages(pixels, [size for size, keep in zip(self.sizes, kept, strict=True) if keep])

    def own(self) -> PackedImages:
        """The same images in memory of their own."""
        return replace(self, pixels=new_memory(self.pixels.numel(), np.uint8).copy_(self.pixels))


def new_memory(count: int, dtype: type[np.generic]) -> Tensor:
    """Memory ``[count]`` of the processor, of any content: numpy asks for huge pages and torch does not.

    The first touch of small pages takes 0.3 ms for an image of 512 x 512 pixels in bytes, thirty times the copy itself.
    """
    return torch.from_numpy(np.empty(count, dtype=dtype))


def num_bytes(sizes: Sequence[Size]) -> int:
    """Bytes of images of these sizes."""
    return sum(3 * height * width for height, width in sizes)


@dataclass
class BufferReference:
    """Images in a worker's buffer, which itself goes along only where the other side has not got it yet.

    Handing shared memory to another process takes a file descriptor through a socket, for every batch again. The owner is a process
    and its ``ImageBuffers``, the number one of their buffers.
    """

    owner: tuple[int, int]
    number: int
    sizes: list[Size]
    buffer: Tensor | None

    def resolve(self, buffers: dict[Any, Tensor]) -> PackedImages:
        """The images; ``buffers`` holds those that came before, and this one from now on."""
        if self.buffer is not None:
            buffers[self.owner, self.number] = self.buffer
        return PackedImages(buffers[self.owner, self.number][: num_bytes(self.sizes)], self.sizes)


class ImageBuffers:
    """Buffers that take each image of a batch as soon as it is decoded, while it still lies in the processor's cache.

    In a worker the same few buffers of shared memory are used in turns: the first touch of fresh shared memory takes four times the
    copy itself, per batch. A buffer is written again ``NUM_BUFFERS`` batches later. Torch's loader asks a worker for its
    batch j + 2 when batch j is taken out, so batch j + 6 is not begun before batch j + 4 is taken out; a reader that has done with
    j before it asks for j + 4 never sees a buffer change. Lightning has: it takes one batch ahead, and makes floats of the older
    one before it takes the next. Outside of a worker every batch has memory of its own.

    Channels stay last: bringing them to the front costs ten times the copy, and nothing extra on the way to floats.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}
        self._number = -1
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._sizes: list[Size] = []
        self._end = 0
        self._capacity = 0
        self._sent: set[int] = set()
        self._iteration = 0

    @property
    def count(self) -> int:
        """Number of images of this batch."""
        return len(self._sizes)

    def start(self, capacity: int, iteration: int = 0) -> None:
        """Begin a batch that will hold about ``capacity`` images as large as the first; it grows where there are more.

        ``iteration`` counts how often the loader has begun: what it has been sent before may have been thrown away.
        """
        if iteration != self._iteration:
            self._sent.clear()
            self._iteration = iteration
        self._sizes, self._end, self._capacity = [], 0, max(capacity, 1)
        self._number = (self._number + 1) % NUM_BUFFERS

    def put(self, image: NDArray[np.uint8]) -> None:
        """Copy an image ``[H, W, 3]`` behind those of this batch."""
        first, self._end = self._end, self._end + image.size
        if not first:
            self._buffer = self._next_buffer(self._capacity * image.size)
        if self._end > len(self._buffer):
            former = self._buffer[:first]
            self._buffer = self._next_buffer(2 * self._end)
            self._buffer[:first] = former
        self._buffer.numpy()[first : self._end] = image.reshape(-1)
        self._sizes.append((image.shape[0], image.shape[1]))

    def drop_to(self, count: int) -> None:
        """Forget the images after the first ``count``: their sample turned out to be bad."""
        del self._sizes[count:]
        self._end = num_bytes(self._sizes)

    def packed(self) -> PackedImages | None:
        """Those of this batch; None where there are none."""
        return PackedImages(self._buffer[: self._end], self._sizes) if self._sizes else None

    def images(self) -> PackedImages | BufferReference | None:
        """Those of this batch, from a worker as a reference; None where there are none."""
        if not self._sizes or get_worker_info() is None:
            return self.packed()
        buffer = None if self._number in self._sent else self._buffer
        self._sent.add(self._number)
        return BufferReference((os.getpid(), id(self)), self._number, self._sizes, buffer)

    def _next_buffer(self, size: int) -> Tensor:
        if get_worker_info() is None:
            return new_memory(size, np.uint8)
        if self._number not in self._buffers or self._buffers[self._number].numel() < size:
            room = size + size // 8  # images of another bucket are a little larger
            self._buffers[self._number] = torch.empty(room, dtype=torch.uint8).share_memory_()
            self._sent.discard(self._number)
        return self._buffers[self._number]
