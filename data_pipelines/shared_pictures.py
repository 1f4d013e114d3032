"""Room for decoded pictures that worker processes share with the process that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

#: Pictures ``[H, W, 3]`` of one size, at least one, to one tensor ``[M, H, W, 3]``.
Stack = Callable[[Sequence[NDArray[np.uint8]]], Tensor]


def stack_pictures(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures ``[H, W, 3]`` to ``[M, H, W, 3]``, in a worker straight into shared memory.

    Channels stay last: bringing them to the front costs ten times the copy, and nothing extra on the way to floats.
    """
    stacked = torch.empty(len(pictures), *pictures[0].shape, dtype=torch.uint8)
    if get_worker_info() is not None:
        stacked.share_memory_()
    np.stack(pictures, out=stacked.numpy())
    return stacked


class PictureRing:
    """``stack_pictures`` of a worker into the same few rooms of shared memory, in turns.

    The first touch of fresh shared memory takes four times the copy itself, for every batch anew. A room is written again
    ``NUM_ROOMS`` batches later. Torch's loader asks a worker for its batch j + 2 when batch j is taken out, so batch j + 6 is not
    begun before batch j + 4 is taken out; a reader that has done with j before it asks for j + 4 never sees a room change.
    Lightning has: it takes one batch ahead, and makes floats of the older one before it takes the next.
    """

    def __init__(self) -> None:
        self._rooms: list[Tensor] = []
        self._turn = 0

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """The pictures, in the room whose turn it is; outside of a worker in memory of their own."""
        if get_worker_info() is None:
            return stack_pictures(pictures)
        shape = (len(pictures), *pictures[0].shape)
        size = int(np.prod(shape))
        turn, self._turn = self._turn, (self._turn + 1) % NUM_ROOMS
        if turn == len(self._rooms):
            self._rooms.append(torch.empty(0, dtype=torch.uint8))
        if self._rooms[turn].numel() < size:
            self._rooms[turn] = torch.empty(size, dtype=torch.uint8).share_memory_()
        stacked = self._rooms[turn][:size].view(shape)
        np.stack(pictures, out=stacked.numpy())
        return stacked
