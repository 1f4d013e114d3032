"""Data contract between loader and method, and the letters used for shapes everywhere.

Letters: B batch rows, M images of the whole batch (rows may hold zero, one or several), L sequence length, N image tokens or
queries of one row, D language-model width, E condition width, C latent channels, h, w grid cells, H, W pixels, G group size,
T generated tokens. Time t lies in [0, 1]: 0 is data, 1 is noise. Images are float tensors in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from umm_zoo.conversation import IMAGE_MARKER, Conversation, Task, Turn, split_answer, task_of, user_text
from umm_zoo.errors import UserError, several


class Grid(NamedTuple):
    """Height and width of a token grid, in cells; tokens are in raster order (row by row)."""

    h: int
    w: int

    @property
    def num_cells(self) -> int:
        """Number of tokens, h * w."""
        return self.h * self.w


class Crop(NamedTuple):
    """What a loader cut away of an image; pairs are height and width, in pixels, the offset that of the upper left corner.

    SDXL is conditioned on ``original`` and ``offset`` (Podell et al. 2023, section 2.2).
    """

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
    """

    values: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 3:
            raise ValueError(f"Tokens.values must be [B, N, D], found shape {list(self.values.shape)}")
        if self.mask is not None and self.mask.shape != self.values.shape[:2]:
            raise ValueError(f"Tokens.mask must be [B, N] = {list(self.values.shape[:2])}, found {list(self.mask.shape)}")


@dataclass
class Batch:
    """A batch of samples of any task.

    Args:
        keys: one name per row, ``source/shard:sample``, as the ledger and every error message print it.
        conversations: one list of turns per row; a user turn holds one ``<image>`` marker per image. The last assistant turn is
            the answer that is trained and scored. Empty for rows without text.
        images: ``[M, 3, H, W]`` in [-1, 1], the input images of all rows, row after row; None where no row has one.
        image_counts: number of images of each row, summing to M.
        targets: ``[T, 3, H, W]`` in [-1, 1], the images that rows ask for (text-to-image, editing), row after row; None where no
            row does.
        meta: one dict of ground truth per row (``task``, ``kind``, ``scene``, ``pair`` …), for metrics only.
        tasks: what each row asks for; where it is not given, what its images say: without a target a question, with one
            text-to-image, an edit or a composition by the number of input images.
        extras: precomputed members of the shards by name, one entry per row, or as many as ``entries`` says.
        has_target: whether each row asks for an image, T of them; where it is not given, all do if there are targets.
        entries: by the name of an extra, entries of each row (of its images, of its target) where that is not one.
        stands_in: whether the rows repeat others, where a micro-batch had no good one: they weigh nothing in training.
        ahead: where gradients are accumulated, on the first micro-batch of an optimiser step: the others, as the loader gives them.

    Raises:
        ValueError: lengths disagree, or the images have the wrong rank or dtype.
    """

    keys: list[str]
    conversations: list[Conversation]
    images: Tensor | None = None
    image_counts: list[int] = field(default_factory=list)
    targets: Tensor | None = None
    meta: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    extras: dict[str, Tensor] = field(default_factory=dict)
    has_target: list[bool] = field(default_factory=list)
    entries: dict[str, list[int]] = field(default_factory=dict)
    stands_in: bool = False
    ahead: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        several("Batch.keys", self.keys)
        size = len(self.keys)
        self.image_counts = self.image_counts or [0] * size
        self.meta = self.meta or [{} for _ in range(size)]
        if not self.mixed:
            self.has_target = [self.targets is not None] * size
        self.tasks = self.tasks or [task_of(*row) for row in zip(self.image_counts, self.has_target, strict=False)]
        for name in ("conversations", "image_counts", "meta", "has_target", "tasks"):
            if len(getattr(self, name)) != size:
                raise ValueError(f"Batch.{name} has {len(getattr(self, name))} rows, Batch.keys has {size}")
        num_images = 0 if self.images is None else len(self.images)
        if sum(self.image_counts) != num_images:
            raise ValueError(f"Batch.image_counts sum to {sum(self.image_counts)}, Batch.images holds {num_images}")
        for name in ("images", "targets"):
            image = getattr(self, name)
            if image is not None and (image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point()):
                raise ValueError(f"Batch.{name} must be floating [*, 3, H, W], found {image.dtype} {list(image.shape)}")
        num_targets = 0 if self.targets is None else len(self.targets)
        if sum(self.has_target) != num_targets:
            raise ValueError(f"Batch.targets has {num_targets} rows, {sum(self.has_target)} of {size} rows have a target")

    def __len__(self) -> int:
        return len(self.keys)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {f.name: move(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **changed, extras={name: move(value) for name, value in self.extras.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on ``device``; Lightning calls this."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader calls this when asked to pin."""
        return self._map(lambda tensor: tensor.pin_memory())

    @property
    def mixed(self) -> bool:
        """Whether some rows ask for an image and others do not."""
        return any(self.has_target) and not all(self.has_target)

    def select(self, rows: Sequence[int]) -> Batch:
        """Some rows, in the given order; extras of which nobody knows the row of an entry are dropped."""
        images = [image for row in rows for image in self.images_of(row)]
        targets = [target for row in rows if (target := self.target_of(row)) is not None]
        extras: dict[str, Tensor] = {}
        for name, values in self.extras.items():
            counts = self.entries.get(name, [1] * len(self))
            if sum(counts) == len(values):
                parts = values.split(counts)
                extras[name] = torch.cat([parts[row] for row in rows]) if rows else values[:0]
        return Batch(
            keys=[self.keys[row] for row in rows],
            conversations=[self.conversations[row] for row in rows],
            images=torch.stack(images) if images else None,
            image_counts=[self.image_counts[row] for row in rows],
            targets=torch.stack(targets) if targets else None,
            meta=[self.meta[row] for row in rows],
            tasks=[self.tasks[row] for row in rows],
            extras=extras,
            has_target=[self.has_target[row] for row in rows],
            entries={name: [counts[row] for row in rows] for name, counts in self.entries.items() if name in extras},
        )

    def target_of(self, row: int) -> Tensor | None:
        """The image that a row asks for, ``[3, H, W]``; None where it asks for none."""
        return self.targets[sum(self.has_target[:row])] if self.targets is not None and self.has_target[row] else None

    def images_of(self, row: int) -> Tensor:
        """The images of one row, ``[image_counts[row], 3, H, W]`` (possibly empty)."""
        if self.images is None:
            return torch.empty(0, 3, 0, 0)
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


def whole_steps(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """The same micro-batches, read ``size`` at a time; the first of each optimiser step holds the others, see ``Batch.ahead``."""
    iterator = iter(batches)
    while step := list(islice(iterator, size)):
        step[0].ahead = step[1:]
        yield from step


def request_batch(prompts: Sequence[str], images: Sequence[Sequence[Tensor]] | None = None) -> Batch:
    """Requests for images as a batch; markers are put in front of a prompt that has none.

    A prompt alone is text-to-image, with one image an edit, with several a composition. An empty prompt asks for a reconstruction
    of its images, and without any for whatever the model likes.

    Raises:
        ValueError: as many groups of images as prompts are needed, images of one size.
        UserError: a single text or image stands where a list belongs, or a prompt has markers for other images than its own.
    """
    several("prompts", prompts)
    several("images", () if images is None else images, object)
    groups: Iterable[Any] = [[] for _ in prompts] if images is None else images
    shown = [list(group) if isinstance(group, Iterable) else [group] for group in groups]
    for image in (image for group in shown for image in group):
        if not isinstance(image, Tensor) or image.ndim != 3:
            found = f"a tensor {list(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
            raise UserError("images", found, "for each prompt a list of images, tensors [3, H, W] in [-1, 1]")
    if len(shown) != len(prompts):
        raise ValueError(f"found {len(prompts)} prompts and {len(shown)} groups of images")
    conversations: list[Conversation] = []
    tasks: list[Task] = []
    for row, (prompt, group) in enumerate(zip(prompts, shown, strict=True)):
        if (markers := prompt.count(IMAGE_MARKER)) not in (0, len(group)):
            raise UserError("", f"{markers} {IMAGE_MARKER} markers", f"{len(group)}, one for each image of the row", row=row)
        marked = prompt if IMAGE_MARKER in prompt else "\n".join([IMAGE_MARKER] * len(group) + ([prompt] if prompt else []))
        conversations.append([Turn(role="user", text=marked)])
        empty = Task.RECONSTRUCT if group else Task.UNCONDITIONAL
        tasks.append(task_of(len(group), True) if prompt.strip() else empty)
    every = [image for group in shown for image in group]
    if len({image.shape for image in every}) > 1:
        raise ValueError(f"images of one call must be of one size, found {sorted({tuple(image.shape) for image in every})}")
    return Batch(
        keys=[f"prompt {row}" for row in range(len(prompts))],
        conversations=conversations,
        images=torch.stack(every) if every else None,
        image_counts=[len(group) for group in shown],
        tasks=tasks,
    )


def image_of_each_row(batch: Batch) -> Tensor:
    """The first input image of each row, or the image it asks for where it has none, ``[B, 3, H, W]``.

    Raises:
        UserError: a row has neither.
    """
    chosen = []
    for row, key in enumerate(batch.keys):
        images = batch.images_of(row)
        image = images[0] if len(images) else batch.target_of(row)
        if image is None:
            raise UserError(key, "no image", "an image or a target")
        chosen.append(image)
    return torch.stack(chosen)


__all__ = ["IMAGE_MARKER", "Batch", "Conversation", "Crop", "Grid", "Task", "Tokens", "Turn", "image_of_each_row", "request_batch"]
__all__ += ["whole_steps"]
