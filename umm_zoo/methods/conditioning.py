"""Requests with something left out: what training drops to, and what guidance compares.

A request has words and maybe images. Its four versions are ``full``, ``image`` (the images without the instruction), ``text``
(the instruction without the images) and ``nothing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Turn

Version = Literal["full", "image", "text", "nothing"]
DrawingTask = Literal["unconditional", "text_to_image", "reconstruction", "edit", "composition"]

#: Values of ``meta["task"]`` that the images of a row cannot tell.
_STATED: tuple[DrawingTask, ...] = ("unconditional", "reconstruction")


def drawing_tasks(batch: Batch) -> list[DrawingTask]:
    """What each row asks to be drawn: as ``meta["task"]`` says for reconstruction and unconditional rows, else by its images.

    No image is text-to-image, one an edit, several a composition.
    """
    tasks: list[DrawingTask] = []
    for meta, count in zip(batch.meta, batch.image_counts, strict=True):
        stated = next((task for task in _STATED if meta.get("task") == task), None)
        tasks.append(stated or ("text_to_image" if count == 0 else "edit" if count == 1 else "composition"))
    return tasks


def stated_version(task: DrawingTask) -> Version:
    """The version that a task trains: reconstruction is ``image``, unconditional ``nothing``."""
    versions: dict[DrawingTask, Version] = {"unconditional": "nothing", "reconstruction": "image"}
    return versions.get(task, "full")


@dataclass(frozen=True)
class Prompts:
    """What stands in a prompt in place of what was left out.

    Rows of the tasks "reconstruction" and "unconditional" are given these words too, whatever their shard says, so that the
    branches of guidance are exactly what was trained.

    Args:
        unconditional: the words without instruction or image (OpenUni's).
        reconstruction: the words beside images without instruction (our choice).
        black_images: keep the place of images left out, filled with black, as MetaQuery does; otherwise they are gone.
    """

    unconditional: str = "Generate an image."
    reconstruction: str = "Reconstruct the image."
    black_images: bool = False

    def apply(self, batch: Batch, versions: Sequence[Version]) -> Batch:
        """The batch with each row in the given version; answers are dropped."""
        conversations: list[Conversation] = []
        images: list[Tensor] = []
        counts: list[int] = []
        for row, (prompt, version) in enumerate(zip(batch.prompts(), versions, strict=True)):
            shown = batch.images_of(row)
            if version in ("text", "nothing"):
                shown = torch.full_like(shown, -1.0) if self.black_images else shown[:0]
            if version in ("image", "nothing"):
                words = self.reconstruction if version == "image" else self.unconditional
                prompt = [Turn(role="user", text="\n".join([IMAGE_MARKER] * len(shown) + ([words] if words else [])))]
            elif not len(shown):
                prompt = [Turn(role=turn["role"], text=turn["text"].replace(IMAGE_MARKER, "").strip()) for turn in prompt]
            conversations.append(prompt)
            images += list(shown)
            counts.append(len(shown))
        stacked = torch.stack(images) if images else None
        return replace(batch, conversations=conversations, images=stacked, image_counts=counts)


class ConditionDropout:
    """Leaves out parts of the condition at random, so that the branches of guidance are trained.

    WeMMU trains its branches as tasks; 10 % of the words in text-to-image are our choice, as in its parents.

    Args:
        text_to_image: share of text-to-image rows that lose their words.
        reconstruction: share of reconstruction rows that lose their image.
        edit_text, edit_image, edit_both: share of rows with images and an instruction that lose one of the two, or both.

    Raises:
        ValueError: a share is negative, or those of one task exceed one.
    """

    def __init__(
        self,
        text_to_image: float = 0.1,
        reconstruction: float = 0.0,
        edit_text: float = 0.0,
        edit_image: float = 0.0,
        edit_both: float = 0.0,
    ) -> None:
        edits: list[tuple[Version, float]] = [("image", edit_text), ("text", edit_image), ("nothing", edit_both)]
        self.shares: dict[DrawingTask, list[tuple[Version, float]]] = {
            "text_to_image": [("nothing", text_to_image)],
            "reconstruction": [("nothing", reconstruction)],
            "edit": edits,
            "composition": edits,
        }
        for task, shares in self.shares.items():
            if min(share for _, share in shares) < 0 or sum(share for _, share in shares) > 1:
                raise ValueError(f"dropout: found shares {[share for _, share in shares]} for {task}, expected 0 to 1 in sum")

    def __call__(self, tasks: Sequence[DrawingTask], generator: torch.Generator | None = None) -> list[Version]:
        """The version of each row."""
        versions = []
        for task, number in zip(tasks, torch.rand(len(tasks), generator=generator, device="cpu").tolist(), strict=True):
            version = stated_version(task)
            for other, share in self.shares.get(task, []):
                if 0 <= number < share:
                    version = other
                number -= share
            versions.append(version)
        return versions


class Guidance:
    """How strongly each part of a request is followed, and so the weight of each version's prediction.

    With e the prediction under a version: text-to-image ``e_nothing + text (e_full - e_nothing)``; a reconstruction ``e_nothing +
    reconstruction (e_image - e_nothing)``; an edit ``e_nothing + reconstruction (e_image - e_nothing) + edit (e_full - e_image)``;
    a composition of several images ``e_nothing + composition (e_full - e_nothing)``, or the form of edits where ``composition``
    is None (MetaQuery).

    The defaults are WeMMU's; that its "rec" branch is the version ``image`` and its "unc" branch ``nothing`` is our reading.

    Args:
        text, reconstruction, edit, composition: the scales; 1 everywhere is no guidance.
    """

    def __init__(self, text: float = 4.0, reconstruction: float = 2.0, edit: float = 3.0, composition: float | None = 3.0) -> None:
        self.text, self.reconstruction, self.edit, self.composition = text, reconstruction, edit, composition

    @classmethod
    def none(cls) -> Guidance:
        """The prediction under the full request alone."""
        return cls(1.0, 1.0, 1.0, 1.0)

    def weights(self, task: DrawingTask) -> dict[Version, float]:
        """Weight of each version that counts; they add up to one."""
        weights: dict[Version, float]
        if task == "unconditional":
            weights = {"nothing": 1.0}
        elif task == "reconstruction":
            weights = {"nothing": 1 - self.reconstruction, "image": self.reconstruction}
        elif task == "text_to_image":
            weights = {"nothing": 1 - self.text, "full": self.text}
        elif task == "composition" and self.composition is not None:
            weights = {"nothing": 1 - self.composition, "full": self.composition}
        else:
            weights = {"nothing": 1 - self.reconstruction, "image": self.reconstruction - self.edit, "full": self.edit}
        return {version: weight for version, weight in weights.items() if weight}


def select_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, in the given order; extras that are not per row are dropped."""
    images = [image for row in rows for image in batch.images_of(row)]
    index = torch.tensor(list(rows), dtype=torch.long)
    return Batch(
        keys=[batch.keys[row] for row in rows],
        conversations=[batch.conversations[row] for row in rows],
        images=torch.stack(images) if images else None,
        image_counts=[batch.image_counts[row] for row in rows],
        targets=None if batch.targets is None else batch.targets[index.to(batch.targets.device)],
        meta=[batch.meta[row] for row in rows],
        extras={name: value[index.to(value.device)] for name, value in batch.extras.items() if len(value) == len(batch)},
    )
