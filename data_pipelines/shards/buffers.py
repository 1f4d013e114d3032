"""Buffers of decoded images that worker processes share with the process that trains."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
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


@dataclass
class BufferReference:
    """Images in a worker's buffer, which itself goes along only where the other side has not got it yet.

    Handing shared memory to another process takes a file descriptor through a socket, for every batch again. The owner is a process
    and its ``ImageBuffers``, the number one of their buffers.
    """

    owner: tuple[int, int]
    number: int
    shape: tuple[int, ...]
    buffer: Tensor | None

    def resolve(self, buffers: dict[Any, Tensor]) -> Tensor:
        """The images; ``buffers`` holds those that came before, and this one from now on."""
        if self.buffer is not None:
            buffers[self.owner, self.number] = self.buffer
        return buffers[self.owner, self.number][: math.prod(self.shape)].view(self.shape)


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
        self._shape: tuple[int, ...] = ()
        self._capacity = 0
        self._sent: set[int] = set()
        self._iteration = 0
        self.count = 0

    def start(self, capacity: int, iteration: int = 0) -> None:
        """Begin a batch that will hold about ``capacity`` images; it grows where there are more.

        ``iteration`` counts how often the loader has begun: what it has been sent before may have been thrown away.
        """
        if iteration != self._iteration:
            self._sent.clear()
            self._iteration = iteration
        self.count, self._shape, self._capacity = 0, (), max(capacity, 1)
        self._number = (self._number + 1) % NUM_BUFFERS

    def put(self, image: NDArray[np.uint8]) -> None:
        """Copy an image ``[H, W, 3]`` behind those of this batch; a ``ValueError`` where they are of another size."""
        if not self._shape:
            self._shape = image.shape
            self._buffer = self._next_buffer(self._capacity * image.size)
        if image.shape != self._shape:
            raise ValueError(f"found an image of {image.shape}, expected {self._shape} as in the rest of the batch")
        first = self.count * image.size
        if first + image.size > len(self._buffer):
            former = self._buffer[:first]
            self._buffer = self._next_buffer(2 * (first + image.size))
            self._buffer[:first] = former
        self._buffer.numpy()[first : first + image.size] = image.reshape(-1)
        self.count += 1

    def drop_to(self, count: int) -> None:
        """Forget the images after the first ``count``: their sample turned out to be bad."""
        self.count = count

    def images(self) -> Tensor | BufferReference | None:
        """Those of this batch, ``[count, H, W, 3]``, from a worker as a reference; None where there are none."""
        if not self.count:
            return None
        shape = (self.count, *self._shape)
        if get_worker_info() is None:
            return self._buffer[: math.prod(shape)].view(shape)
        buffer = None if self._number in self._sent else self._buffer
        self._sent.add(self._number)
        return BufferReference((os.getpid(), id(self)), self._number, shape, buffer)

    def _next_buffer(self, size: int) -> Tensor:
        if get_worker_info() is None:
            return torch.empty(size, dtype=torch.uint8)
        if self._number not in self._buffers or self._buffers[self._number].numel() < size:
            self._buffers[self._number] = torch.empty(size, dtype=torch.uint8).share_memory_()
            self._sent.discard(self._number)
        return self._buffers[self._number]
