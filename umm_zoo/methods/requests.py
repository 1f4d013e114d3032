"""Requests for images, from Python, as a batch, and the seeds of what is generated for a batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from umm_zoo.backbones.preparation import Asked, WholeRows
from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Task, Turn
from umm_zoo.conversation import task_of
from umm_zoo.errors import UserError, several


def request_batch(prompts: Sequence[str], images: Sequence[Sequence[Tensor]] | None = None) -> Batch:
    """Requests for images as a batch; markers are put in front of a prompt that has none.

    A prompt alone is text-to-image, with one image an edit, with several a composition. An empty prompt asks for a reconstruction
    of its images, and without any for whatever the model likes.

    Raises:
        ValueError: as many groups of images as prompts are needed.
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
    return Batch(
        keys=[f"prompt {row}" for row in range(len(prompts))],
        conversations=conversations,
        images=[image for group in shown for image in group],
        image_counts=[len(group) for group in shown],
        tasks=tasks,
    )


def row_seeds(batch: Batch) -> list[int]:
    """A seed per row that depends on the row alone; rows of a ``pair`` share theirs, so that they differ by the request alone."""
    names = [str(meta.get("pair", key)) for meta, key in zip(batch.meta, batch.keys, strict=True)]
    return [zlib.crc32(name.encode()) for name in names]


def of_kind(batch: Batch, has_target: bool) -> Batch:
    """The rows that ask for an image, or those that do not."""
    rows = [row for row, own in enumerate(batch.has_target) if own == has_target]
    return batch if len(rows) == len(batch) else batch.select(rows)


def check_kinds(batch: Batch, method: str, images: Callable[[Batch], None], answers: Callable[[Batch], None]) -> None:
    """Refuse rows that show an image and ask for one, and what the check of each kind refuses, by its number in the batch.

    Args:
        batch: rows of both kinds.
        method: its name, for the error.
        images, answers: checks of the rows that ask for an image, and of the others.
    """
    for row, (count, generated) in enumerate(zip(batch.image_counts, batch.has_target, strict=True)):
        if generated and count:
            raise UserError("", f"{count} input images and one to generate", f"either: {method} generates from text alone", row=row)
    for generated, check in ((False, answers), (True, images)):
        try:
            check(of_kind(batch, generated))
        except UserError as error:
            rows = [row for row, own in enumerate(batch.has_target) if own == generated]
            error.row = None if error.row is None else rows[error.row]
            raise


def no_answer() -> Batch:
    """A row without an answer, in whose place no label is learnt."""
    return Batch(["nothing"], [[Turn(role="user", text="")]])


@dataclass
class AnswerRows:
    """``WholeRows`` of the rows that ask for no image."""

    answers: bool

    def __call__(self, batch: Batch) -> Iterable[Asked]:
        """As the protocol says."""
        rows = of_kind(batch, False)
        return WholeRows(self.answers)(rows) if len(rows) else []
