"""What an image processor makes of the images of rows, and where it waits for the step that asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: Tensors by the names that a vision tower takes them by.
Made = dict[str, Tensor]


@dataclass
class ProcessedImages:
    """Tensors of the images of rows in few pieces of memory: to hand each to another process takes a file descriptor.

    Args:
        flat: by name those of all rows, one behind the other, ``[sum of elements]``.
        rows: of each row with images, by name, where its tensor begins and its shape.
    """

    flat: Made = field(default_factory=dict)
    rows: list[dict[str, tuple[int, torch.Size]]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Tensor]]) -> ProcessedImages:
        """Those of some rows."""
        ends, places = dict[str, int](), []
        for row in rows:
            places.append({name: (ends.get(name, 0), own.shape) for name, own in row.items()})
            ends |= {name: ends.get(name, 0) + own.numel() for name, own in row.items()}
        return cls({name: torch.cat([row[name].reshape(-1) for row in rows if name in row]) for name in ends}, places)

    def only(self, kept: Sequence[bool]) -> ProcessedImages:
        """Those of some of the rows with images."""
        return replace(self, rows=[row for row, keep in zip(self.rows, kept, strict=True) if keep])

    def map(self, move: Callable[[Tensor], Tensor]) -> ProcessedImages:
        """The same after ``move``, but for sizes and counts, which stay on the host, where they are read."""
        return replace(self, flat={name: move(own) if own.is_floating_point() else own for name, own in self.flat.items()})

    def keep_for(self, images: Sequence[Tensor], image_counts: Sequence[int]) -> None:
        """Let ``waiting`` find them by the images of each row."""
        left = iter(images)
        rows = [list(islice(left, count)) for count in image_counts if count]
        for own, places in zip(rows, self.rows, strict=True):
            made = {name: self.flat[name][first : first + shape.numel()].view(shape) for name, (first, shape) in places.items()}
            _waiting[own[0]] = (own[1:], made)


#: By the first image of a row, as an object: its other images, and what was made of them. Gone with the image.
_waiting: Any = WeakTensorKeyDictionary()


def waiting(images: Sequence[Tensor]) -> Made | None:
    """What was made of exactly these images of a row; None where nothing was, or an image has been changed since."""
    others, made = _waiting.get(images[0], ((), None))
    return made if len(others) == len(images) - 1 and all(a is b for a, b in zip(others, images[1:], strict=True)) else None


def joined(rows: Sequence[Mapping[str, Tensor]]) -> Made:
    """Rows as one call of the library's image processors gives them: zeros behind what is shorter than in another row."""
    made: Made = {}
    for name in rows[0]:
        own = [row[name] for row in rows]
        longest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in own), strict=True)]
        made[name] = torch.cat([_padded(tensor, longest) for tensor in own])
    return made


def _padded(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [side for count in reversed(missing) for side in (0, count)]) if any(missing) else tensor
