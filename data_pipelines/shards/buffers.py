"""Room for decoded images that worker processes share with the process that trains."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
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
#: share its room. One more for safety.
NUM_ROOMS = PREFETCH + 4


def stack_images(images: Sequence[NDArray[np.uint8]]) -> Tensor | None:
    """Images ``[H, W, 3]`` to ``[M, H, W, 3]``, in a worker straight into shared memory; None where there are none.

    Channels stay last: bringing them to the front costs ten times the copy, and nothing extra on the way to floats.
    """
    if not images:
        return None
    stacked = torch.empty(len(images), *images[0].shape, dtype=torch.uint8)
    if get_worker_info() is not None:
        stacked.share_memory_()
    np.stack(images, out=stacked.numpy())
    return stacked


@dataclass
class Lent:
    """Images of a worker on their way: the room they lie in goes along only where the other side has not got it yet.

    Handing shared memory to another process takes a file descriptor through a socket, for every batch anew.

    Args:
        ring: whose room it is.
        turn: which of its rooms.
        shape: of the images in it.
        room: the room itself, the first time.
    """

    ring: tuple[int, int]
    turn: int
    shape: tuple[int, ...]
    room: Tensor | None

    def taken(self, rooms: dict[Any, Tensor]) -> Tensor:
        """The images; ``rooms`` holds those that came before, and this one from now on."""
        if self.room is not None:
            rooms[self.ring, self.turn] = self.room
        return rooms[self.ring, self.turn][: math.prod(self.shape)].view(self.shape)


class ImageRing:
    """Where the reader of a batch puts each image as soon as it is decoded, while it still lies in the processor's cache.

    In a worker the same few rooms of shared memory are used in turns: the first touch of fresh shared memory takes four times the
    copy itself, for every batch anew. A room is written again ``NUM_ROOMS`` batches later. Torch's loader asks a worker for its
    batch j + 2 when batch j is taken out, so batch j + 6 is not begun before batch j + 4 is taken out; a reader that has done with
    j before it asks for j + 4 never sees a room change. Lightning has: it takes one batch ahead, and makes floats of the older one
    before it takes the next. Outside of a worker every batch has memory of its own.
    """

    def __init__(self) -> None:
        self._rooms: list[Tensor] = []
        self._turn = -1
        self._room = torch.empty(0, dtype=torch.uint8)
        self._shape: tuple[int, ...] = ()
        self._capacity = 0
        self._known: set[int] = set()
        self._reading = 0
        self.count = 0

    def start(self, capacity: int, reading: int = 0) -> None:
        """Begin a batch that will hold about ``capacity`` images; it grows where there are more.

        ``reading`` counts how often the loader has begun: what it has been sent before may have been thrown away.
        """
        if reading != self._reading:
            self._known.clear()
            self._reading = reading
        self.count, self._shape, self._capacity = 0, (), max(capacity, 1)
        self._turn = (self._turn + 1) % NUM_ROOMS

    def put(self, image: NDArray[np.uint8]) -> None:
        """Copy an image ``[H, W, 3]`` behind those of this batch.

        Raises:
            ValueError: it is of another size than they are.
        """
        if not self._shape:
            self._shape = image.shape
            self._room = self._next_room(self._capacity * image.size)
        if image.shape != self._shape:
            raise ValueError(f"found an image of {image.shape}, expected in this batch are {self._shape}")
        first = self.count * image.size
        if first + image.size > len(self._room):
            self._room = self._next_room(2 * (first + image.size), self._room[:first])
        self._room.numpy()[first : first + image.size] = image.reshape(-1)
        self.count += 1

    def drop_to(self, count: int) -> None:
        """Forget the images after the first ``count``: their sample turned out to be bad."""
        self.count = count

    def images(self) -> Tensor | Lent | None:
        """Those of this batch, ``[count, H, W, 3]``, from a worker as ``Lent``; None where there are none."""
        if not self.count:
            return None
        shape = (self.count, *self._shape)
        if get_worker_info() is None:
            return self._room[: math.prod(shape)].view(shape)
        room = None if self._turn in self._known else self._room
        self._known.add(self._turn)
        return Lent((os.getpid(), id(self)), self._turn, shape, room)

    def _next_room(self, size: int, content: Tensor | None = None) -> Tensor:
        room = torch.empty(0, dtype=torch.uint8)
        if get_worker_info() is None:
            room = torch.empty(size, dtype=torch.uint8)
        else:
            while self._turn >= len(self._rooms):
                self._rooms.append(room)
            if self._rooms[self._turn].numel() < size:
                self._rooms[self._turn] = torch.empty(size, dtype=torch.uint8).share_memory_()
                self._known.discard(self._turn)
            room = self._rooms[self._turn]
        if content is not None:
            room[: len(content)] = content
        return room
