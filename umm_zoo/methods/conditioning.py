"""Conditioning modes of requests: with something left out, as training drops it and as guidance compares it.

A request has words and maybe images. The four modes are ``full``, ``image`` (the images without the instruction), ``text``
(the instruction without the images) and ``nothing``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from umm_zoo.batch import IMAGE_MARKER, Batch, Conversation, Task, Turn
from umm_zoo.errors import Share, Weight

#: What of a request the model gets to see.
ConditioningMode = Literal["full", "image", "text", "nothing"]


def mode_of(task: Task) -> ConditioningMode:
    """The mode that a task trains: reconstruction is ``image``, unconditional ``nothing``."""
    modes: dict[Task, ConditioningMode] = {Task.UNCONDITIONAL: "nothing", Task.RECONSTRUCT: "image"}
    return modes.get(task, "full")


@dataclass(frozen=True)
class Prompts:
    """Words and images that stand in a prompt in place of those left out.

    Rows of the tasks "reconstruction" and "unconditional" are given these words too, whatever their shard says, so that the
    branches of guidance are exactly what was trained.

    Args:
        unconditional: the words without instruction or image (OpenUni's).
        reconstruction: the words beside images without instruction (our choice).
        black_images: keep the place of images left out, filled with black, as MetaQuery does; otherwise they are gone.
        text_to_image: form of the words of such a request, which take the place of ``{}``.
        behind_image: what stands behind each image; nothing in MetaQuery, a line break in OpenUni.
    """

    unconditional: str = "Generate an image."
    reconstruction: str = "Reconstruct the image."
    black_images: bool = False
    text_to_image: str = "{}"
    behind_image: str = "\n"

    def apply(self, batch: Batch, modes: Sequence[ConditioningMode]) -> Batch:
        """The batch with each row in the given mode; answers are dropped."""
        conversations: list[Conversation] = []
        images: list[Tensor] = []
        counts: list[int] = []
        for row, (prompt, mode) in enumerate(zip(batch.prompts(), modes, strict=True)):
            shown = batch.images_of(row)
            if mode in ("text", "nothing"):
                shown = [torch.full_like(image, -1.0) for image in shown] if self.black_images else []
            if mode in ("image", "nothing"):
                words = self.reconstruction if mode == "image" else self.unconditional
                prompt = [Turn(role="user", text="\n".join([IMAGE_MARKER] * len(shown) + ([words] if words else [])))]
            elif not shown:
                prompt = [Turn(role=turn["role"], text=turn["text"].replace(IMAGE_MARKER, "").strip()) for turn in prompt]
                if batch.tasks[row] is Task.TEXT_TO_IMAGE:
                    prompt = [_of_user(turn, self.text_to_image.replace("{}", turn["text"])) for turn in prompt]
            prompt = [
                _of_user(turn, turn["text"].replace(f"{IMAGE_MARKER}\n", IMAGE_MARKER + self.behind_image)) for turn in prompt
            ]
            conversations.append(prompt)
            images += shown
            counts.append(len(shown))
        return replace(batch, conversations=conversations, images=images, image_counts=counts)


def _of_user(turn: Turn, text: str) -> Turn:
    """A turn with another text where it is the user's."""
    return Turn(role="user", text=text) if turn["role"] == "user" else turn


class ConditionDropout:
    """Random choice of what training leaves out of the condition, so that the branches of guidance are trained.

    WeMMU trains its branches as tasks; 10 % of the words in text-to-image are our choice, as in its parents.

    Args:
        text_to_image: share of text-to-image rows that lose their words.
        reconstruction: share of reconstruction rows that lose their image.
        edit_text, edit_image, edit_both: share of rows with images and an instruction that lose one of the two, or both.
        prompts: what stands in the place of what was left out; None is ``Prompts()``.

    Raises:
        ValueError: a share is negative, or those of one task exceed one.
    """

    def __init__(
        self,
        text_to_image: Share = 0.1,
        reconstruction: Share = 0.0,
        edit_text: Share = 0.0,
        edit_image: Share = 0.0,
        edit_both: Share = 0.0,
        prompts: Prompts | None = None,
    ) -> None:
        self.prompts = prompts or Prompts()
        edits: list[tuple[ConditioningMode, float]] = [("image", edit_text), ("text", edit_image), ("nothing", edit_both)]
        self.shares: dict[Task, list[tuple[ConditioningMode, float]]] = {
            Task.TEXT_TO_IMAGE: [("nothing", text_to_image)],
            Task.RECONSTRUCT: [("nothing", reconstruction)],
            Task.EDIT: edits,
            Task.COMPOSE: edits,
        }
        for task, shares in self.shares.items():
            if min(share for _, share in shares) < 0 or sum(share for _, share in shares) > 1:
                raise ValueError(f"dropout: found shares {[share for _, share in shares]} for {task}, expected 0 to 1 in sum")

    def __call__(self, tasks: Sequence[Task], generator: torch.Generator | None = None) -> list[ConditioningMode]:
        """The mode of each row."""
        modes = []
        for task, number in zip(tasks, torch.rand(len(tasks), generator=generator, device="cpu").tolist(), strict=True):
            mode = mode_of(task)
            for other, share in self.shares.get(task, []):
                if 0 <= number < share:
                    mode = other
                number -= share
            modes.append(mode)
        return modes


class Guidance:
    """Scales of how strongly each part of a request is followed, and so the weight of each mode's prediction.

    With e the prediction under a mode: text-to-image ``e_nothing + text (e_full - e_nothing)``; a reconstruction ``e_nothing +
    reconstruction (e_image - e_nothing)``; an edit ``e_nothing + reconstruction (e_image - e_nothing) + edit (e_full - e_image)``;
    a composition of several images ``e_nothing + composition (e_full - e_nothing)``, or the form of edits where ``composition``
    is None (MetaQuery).

    The defaults are WeMMU's; that its "rec" branch is the mode ``image`` and its "unc" branch ``nothing`` is our choice.

    Args:
        text, reconstruction, edit, composition: the scales; 1 everywhere is no guidance.

    Raises:
        ValueError: one is not finite.
    """

    def __init__(
        self, text: Weight = 4.0, reconstruction: Weight = 2.0, edit: Weight = 3.0, composition: Weight | None = 3.0
    ) -> None:
        for name, scale in (("text", text), ("reconstruction", reconstruction), ("edit", edit), ("composition", composition or 0)):
            if not math.isfinite(scale):
                raise ValueError(f"Guidance.{name}: found {scale}, expected a finite number")
        self.text, self.reconstruction, self.edit, self.composition = text, reconstruction, edit, composition

    @classmethod
    def none(cls) -> Guidance:
        """The prediction under the full request alone."""
        return cls(1.0, 1.0, 1.0, 1.0)

    def changed(self, scale: float | None, image_scale: float | None) -> Guidance:
        """The same with other scales of the request and of input images, where they are given."""
        image = self.reconstruction if image_scale is None else image_scale
        if scale is None:
            return Guidance(self.text, image, self.edit, self.composition)
        return Guidance(scale, image, scale, scale)

    def weights(self, task: Task) -> dict[ConditioningMode, float]:
        """Weight of each mode that counts; they add up to one."""
        weights: dict[ConditioningMode, float]
        if task is Task.UNCONDITIONAL:
            weights = {"nothing": 1.0}
        elif task is Task.RECONSTRUCT:
            weights = {"nothing": 1 - self.reconstruction, "image": self.reconstruction}
        elif task is Task.TEXT_TO_IMAGE:
            weights = {"nothing": 1 - self.text, "full": self.text}
        elif task is Task.COMPOSE and self.composition is not None:
            weights = {"nothing": 1 - self.composition, "full": self.composition}
        else:
            weights = {"nothing": 1 - self.reconstruction, "image": self.reconstruction - self.edit, "full": self.edit}
        return {mode: weight for mode, weight in weights.items() if weight}
