"""Data contract between loader and method, and the letters used for shapes everywhere.

Letters: B batch rows, M images of the whole batch (rows may hold zero, one or several), L sequence length, N image tokens or
queries of one row, D language-model width, E condition width, C latent channels, h, w grid cells, H, W pixels, G group size,
T generated tokens. Time t lies in [0, 1]: 0 is data, 1 is noise. Images are float tensors in [-1, 1] of any sizes, in lists:
they are stacked only inside the block that runs on them, in groups of equal size (``by_size``, ``map_by_size``, ``stacked``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from umm_zoo.conversation import IMAGE_MARKER, Conversation, Task, Turn, split_answer, task_of, user_text
from umm_zoo.errors import UserError, several

#: Images ``[3, H, W]`` of any sizes, or a stack ``[M, 3, H, W]``.
Images = Sequence[Tensor] | Tensor


class Grid(NamedTuple):
    """Height and width of a token grid, in cells; tokens are in raster order (row by row)."""

    h: int
    w: int

    @property
    def num_cells(self) -> int:
        """Number of tokens, h * w."""
        return self.h * self.w


class Crop(NamedTuple):
    """What a loader cut away of an image; pairs are height and width, in pixels, the offset that of the upper left corner."""

    original: tuple[int, int]  #: the upright image of the file
    resized: tuple[int, int]  #: before the cut
    offset: tuple[int, int]
    kept: tuple[int, int]  #: after the cut

    @property
    def lost(self) -> float:
        """Share of the image that was cut away."""
        return 1 - self.kept[0] * self.kept[1] / (self.resized[0] * self.resized[1])


@dataclass
class Tokens:
    """A padded set of tokens.

    Shape:
        - values: ``[B, N, D]``
        - mask: ``[B, N]`` bool, True where a token counts; None means that all do.
        - crops: of a decoder's condition, B of what the loader cut away of the image to generate; empty where nobody knows.
    """

    values: Tensor
    mask: Tensor | None = None
    crops: Sequence[Crop | None] = ()

    def __post_init__(self) -> None:
        if self.values.ndim != 3:
            raise ValueError(f"Tokens.values must be [B, N, D], found shape {list(self.values.shape)}")
        if self.mask is not None and self.mask.shape != self.values.shape[:2]:
            raise ValueError(f"Tokens.mask must be [B, N] = {list(self.values.shape[:2])}, found {list(self.mask.shape)}")

    def select(self, rows: Sequence[int]) -> Tokens:
        """Some rows, in the given order."""
        if list(rows) == list(range(len(self.values))):
            return self
        chosen = torch.as_tensor(rows).to(self.values.device, non_blocking=True)
        mask = None if self.mask is None else self.mask[chosen]
        return Tokens(self.values[chosen], mask, [self.crops[row] for row in rows] if self.crops else ())


@dataclass
class Batch:
    """A batch of samples of any task.

    Args:
        keys: one name per row, ``source/shard:sample``, as the ledger and every error message print it.
        conversations: one list of turns per row; a user turn holds one ``<image>`` marker per image. The last assistant turn is
            the answer that is trained and scored. Empty for rows without text.
        images: M of ``[3, H, W]`` in [-1, 1], of any sizes, the input images of all rows, row after row; a stack is taken apart.
        image_counts: number of images of each row, summing to M.
        targets: per row the image that it asks for (text-to-image, editing), ``[3, H, W]`` in [-1, 1], or None; a stack of one
            per row is taken apart, and without any no row asks for one. An input image again is best the same tensor.
        crops: per row what the loader cut away of the image that it asks for; None where it asks for none, or nobody knows.
        meta: one dict of ground truth per row (``task``, ``kind``, ``scene``, ``pair`` …), for metrics only.
        tasks: what each row asks for; not given, a question, or with a target text-to-image, edit or composition by its images.
        extras: precomputed members of shards by name, an entry per row, or as many as ``entries`` says; lists where shapes differ.
        entries: by the name of an extra, entries of each row (of its images, of its target) where that is not one.
        stands_in: whether the rows repeat others, where a micro-batch had no good one: they weigh nothing in training.
        ahead: where gradients are accumulated, on the first micro-batch of an optimiser step: the others, as the loader gives them.

    Raises:
        ValueError: lengths disagree, or the images have the wrong rank or dtype.
    """

    keys: list[str]
    conversations: list[Conversation]
    images: list[Tensor] = field(default_factory=list)
    image_counts: list[int] = field(default_factory=list)
    targets: list[Tensor | None] = field(default_factory=list)
    meta: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    extras: dict[str, Tensor | list[Tensor]] = field(default_factory=dict)
    entries: dict[str, list[int]] = field(default_factory=dict)
    stands_in: bool = False
    ahead: Sequence[Any] | None = None
    crops: list[Crop | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        several("Batch.keys", self.keys)
        size = len(self.keys)
        self.images = [] if self.images is None else list(self.images)  # of a stack: views of it
        self.targets = [None] * size if self.targets is None else list(self.targets) or [None] * size
        self.image_counts = self.image_counts or [0] * size
        self.crops = self.crops or [None] * size
        self.meta = self.meta or [{} for _ in range(size)]
        self.tasks = self.tasks or [task_of(*row) for row in zip(self.image_counts, self.has_target, strict=False)]
        for name in ("conversations", "image_counts", "crops", "meta", "targets", "tasks"):
            if len(getattr(self, name)) != size:
                raise ValueError(f"Batch.{name} has {len(getattr(self, name))} rows, Batch.keys has {size}")
        if sum(self.image_counts) != len(self.images):
            raise ValueError(f"Batch.image_counts sum to {sum(self.image_counts)}, Batch.images holds {len(self.images)}")
        for name, images in (("images", self.images), ("targets", self.requested)):
            for image in images:
                if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
                    raise ValueError(f"Batch.{name} must be floating [3, H, W] each, found {image.dtype} {list(image.shape)}")

    def __len__(self) -> int:
        return len(self.keys)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        shown = list(map(id, self.images))
        targets = iter(_moved([target for target in self.requested if id(target) not in shown], move))
        again = dict(zip(shown, images := _moved(self.images, move), strict=True))  # what a row shows and asks for stays one
        return replace(
            self,
            images=images,
            targets=[again[id(own)] if id(own) in again else None if own is None else next(targets) for own in self.targets],
            extras={name: _moved(value, move) if isinstance(value, list) else move(value) for name, value in self.extras.items()},
        )

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """The same batch with every tensor on ``device``; Lightning calls this, and CUDA is not waited for unless so said."""
        alone = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return self._map(lambda tensor: tensor.to(device, non_blocking=alone))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader calls this when asked to pin."""
        return self._map(lambda tensor: tensor.pin_memory())

    @property
    def has_target(self) -> list[bool]:
        """Whether each row asks for an image."""
        return [target is not None for target in self.targets]

    @property
    def requested(self) -> list[Tensor]:
        """The images that rows ask for, row after row, of the rows that do."""
        return [target for target in self.targets if target is not None]

    def select(self, rows: Sequence[int]) -> Batch:
        """Some rows, in the given order; extras of which nobody knows the row of an entry are dropped."""
        extras: dict[str, Tensor | list[Tensor]] = {}
        for name, values in self.extras.items():
            counts = self.entries.get(name, [1] * len(self))
            if sum(counts) == len(values):
                ends = list(accumulate(counts))
                own = [place for row in rows for place in range(ends[row] - counts[row], ends[row])]
                extras[name] = values[own] if isinstance(values, Tensor) else [values[place] for place in own]
        per_row = ("keys", "conversations", "image_counts", "targets", "crops", "meta", "tasks")
        chosen: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in per_row}
        return Batch(
            **chosen,
            images=[image for row in rows for image in self.images_of(row)],
            extras=extras,
            entries={name: [counts[row] for row in rows] for name, counts in self.entries.items() if name in extras},
        )

    def target_of(self, row: int) -> Tensor | None:
        """The image that a row asks for, ``[3, H, W]``; None where it asks for none."""
        return self.targets[row]

    def images_of(self, row: int) -> list[Tensor]:
        """The images of one row, ``[3, H, W]`` each (possibly none)."""
        start = sum(self.image_counts[:row])
        return self.images[start : start + self.image_counts[row]]

    def prompts(self) -> list[Conversation]:
        """Each conversation up to, and without, its last assistant turn."""
        return [split_answer(conversation)[0] for conversation in self.conversations]

    def user_texts(self) -> list[str]:
        """What the user of each row says before the last assistant turn."""
        return [user_text(prompt) for prompt in self.prompts()]

    def answers(self) -> list[str]:
        """The text of each row's last assistant turn, empty where there is none."""
        return [split_answer(conversation)[1] for conversation in self.conversations]

    def assert_no_images(self, method: str) -> None:
        """Refuse rows with input images, for a ``method`` that generates from text alone.

        Raises:
            UserError: names the row.
        """
        for row, count in enumerate(self.image_counts):
            if count:
                raise UserError("", f"{count} input images", f"none: {method} generates from text alone", row=row)


def image_of_each_row(batch: Batch) -> list[Tensor]:
    """The first input image of each row, or the image it asks for where it has none.

    Raises:
        UserError: a row has neither.
    """
    chosen = []
    for row, key in enumerate(batch.keys):
        image = next(iter(batch.images_of(row)), batch.target_of(row))
        if image is None:
            raise UserError(key, "no image", "an image or a target")
        chosen.append(image)
    return chosen


#: Places of some images of equal size, and their stack; no places where it stands in for images of which a rank has too few.
Group = tuple[list[int], Tensor]
#: Set while weights are shared out over ranks: splits the groups of a rank and adds stand-ins, so that all ranks have as many.
regroup: ContextVar[Callable[[list[Group]], list[Group]]] = ContextVar("regroup", default=list)


def by_size(images: Images) -> list[Group]:
    """Groups of images of equal size: their places and their stack ``[m, 3, H, W]``, in the order of each group's first image."""
    places: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    whole = len(places) == 1  # nothing is taken apart where all are of one size
    return regroup.get()([(own, stacked(images if whole else [images[place] for place in own])) for own in places.values()])


def stacked(images: Images, where: str = "") -> Tensor:
    """Images of one size as ``[M, 3, H, W]``, not copied where they lie one behind the other in memory.

    Raises:
        UserError: sizes differ; ``where`` says what the user can mend.
    """
    if isinstance(images, Tensor):
        return images
    sizes = list(dict.fromkeys(image.shape for image in images))
    if len(sizes) > 1:
        found = ", ".join(" x ".join(map(str, size[-2:])) for size in sizes[:3]) + (", …" if len(sizes) > 3 else "")
        raise UserError(where, f"images of {found} px in one batch", "images of one size")
    if not _neighbours(images) or len({image.stride() for image in images}) > 1:
        return torch.stack(list(images))
    return images[0].as_strided((len(images), *sizes[0]), (images[0].numel(), *images[0].stride()))  # whatever its axes' order


def map_by_size(function: Callable[[Tensor], Tensor], images: Images) -> list[Tensor]:
    """What ``function`` makes of each image, in their order; it is called once per size, with a stack ``[m, 3, H, W]``."""
    results = dict[int, Tensor]()
    for places, stack in by_size(images):
        made = function(stack)
        results.update(zip(places, made, strict=bool(places)))
        if not places and made.requires_grad:  # the way back is every rank's too
            results[0] = results[0] + 0 * made.sum()
    return [results[place] for place in range(len(images))]


def _neighbours(images: Sequence[Tensor]) -> bool:
    """Whether images lie one behind the other in one memory, and carry no gradient."""
    first, place = images[0], images[0].storage_offset()
    for image in images:
        same = image.dtype == first.dtype and image.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not same or image.storage_offset() != place or image.requires_grad:
            return False
        place += image.numel()
    return True


def _moved(images: Sequence[Tensor], move: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Images after ``move``, which is called once where they lie one behind the other in memory."""
    if not images or not _neighbours(images) or not all(image.is_contiguous() for image in images):
        return [move(image) for image in images]
    numbers = [image.numel() for image in images]
    parts = move(images[0].as_strided((sum(numbers),), (1,))).split(numbers)
    return [part.view(image.shape) for part, image in zip(parts, images, strict=True)]


__all__ = ["IMAGE_MARKER", "Batch", "Conversation", "Crop", "Grid", "Images", "Task", "Tokens", "Turn"]
__all__ += ["by_size", "image_of_each_row", "map_by_size", "stacked"]
