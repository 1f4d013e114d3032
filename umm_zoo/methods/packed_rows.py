"""Rows of a batch as items of packed sequences: texts, and images as they are read and generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from umm_zoo.batch import IMAGE_MARKER, Batch, Task
from umm_zoo.blocks.sequence_plan import Item
from umm_zoo.errors import Share, UserError
from umm_zoo.objectives.guidance import ContextName

#: Forms of an input image: its clean latent, and what the vision tower makes of it.
ImageForm = Literal["clean", "seen"]


class ItemDropout:
    """Random choice, for each item of a request by itself, of what training leaves out: Bagel's.

    Rows that ask for no image keep everything, and so do answers and images to generate.

    Args:
        text, seen, clean: shares of texts, of images of the vision tower, and of clean latents (its release; .1, .5 and .1 are from
            memory of the paper).
    """

    def __init__(self, text: Share = 0.1, seen: Share = 0.3, clean: Share = 0.3) -> None:
        self.shares = {"text": text, "seen": seen, "clean": clean}

    def __call__(self, items: Sequence[Item], generator: torch.Generator | None = None) -> list[Item]:
        """The items of a row that asks for an image."""
        if not any(self.shares.values()):
            return list(items)
        numbers = torch.rand(len(items), generator=generator, device="cpu").tolist()
        return [
            item._replace(dropped=item.dropped or (not item.learnt and number < self.shares.get(item.kind, 0.0)))
            for item, number in zip(items, numbers, strict=True)
        ]


@dataclass
class PackedRows:
    """Rows of items, and the images that they are of.

    Args:
        items: of each row.
        images: by form, input images that stand in the sequences, in their order.
    """

    items: list[list[Item]] = field(default_factory=list)
    images: dict[ImageForm, list[Tensor]] = field(default_factory=lambda: {"clean": [], "seen": []})

    def add(self, items: Sequence[Item], images: Sequence[Tensor | None]) -> None:
        """One more row; ``images`` are those of its items, None where one is of none."""
        self.items.append(list(items))
        for item, image in zip(items, images, strict=True):
            if image is not None and not item.dropped:
                self.images["seen" if item.kind == "seen" else "clean"].append(image)


@dataclass(frozen=True)
class RowPacker:
    """Maker of items: texts of turns in their order, and each input image where its marker stands.

    Of a row that asks for an image, input images stand in all ``shown`` forms and the image to generate last; of another as the
    vision tower reads them. A row of the task "reconstruct" has no words, one of "unconditional" neither words nor images. Answers
    that stand before an image to generate (reasoning) are learnt too; where they alone are asked for, input images stand in all
    forms too.

    Args:
        words: token ids of a text.
        num_tokens: of an image in a form.
        shown: forms, in the order of the sequence.
    """

    words: Callable[[str], list[int]]
    num_tokens: Callable[[ImageForm, Tensor], int]
    shown: Sequence[ImageForm]

    def row(
        self, batch: Batch, row: int, generates: bool, context: ContextName = "whole", answers: bool = True
    ) -> tuple[list[Item], list[Tensor | None]]:
        """Items of a row, and the image of each; without the image to generate.

        Args:
            batch, row: where it is.
            generates: whether it is a row that asks for an image.
            context: what is left out. "no_text" is the last text, and a reasoning with what it is about; of a reasoning that
                stands behind an image, it alone.
            answers: whether the last answer stands there too.
        """
        task = batch.tasks[row] if generates else Task.QUESTION
        turns = batch.conversations[row] if answers else batch.prompts()[row]
        left = iter([] if task is Task.UNCONDITIONAL or context == "no_image" else batch.images_of(row))
        items, images = list[Item](), list[Tensor | None]()
        for turn in turns if task is not Task.UNCONDITIONAL else []:
            for number, text in enumerate(turn["text"].split(IMAGE_MARKER) if turn["role"] == "user" else [turn["text"]]):
                if number and (image := next(left, None)) is not None:
                    for form in self.shown if generates else ("seen",):
                        items.append(Item(form, num_tokens=self.num_tokens(form, image)))
                        images.append(image)
                if text.strip() and task is not Task.RECONSTRUCT:
                    items.append(Item("text", self.words(text.strip()), learnt=turn["role"] == "assistant"))
                    images.append(None)
        if context == "no_text" and (places := [place for place, item in enumerate(items) if item.kind == "text"]):
            last = places.pop()
            about = items[last].learnt and last > 0 and items[last - 1].kind == "text"
            for place in [last, *([last - 1] if about else [])]:
                del items[place], images[place]
        return items, images


def asks_for_image(batch: Batch, row: int) -> bool:
    """Whether a row asks for an image, or for what is written before one."""
    return batch.has_target[row] or batch.tasks[row] not in (Task.CAPTION, Task.QUESTION)


def check_markers(batch: Batch) -> None:
    """Refuse a row whose markers are not as many as its images.

    Raises:
        UserError: names the row.
    """
    for row, (turns, count) in enumerate(zip(batch.conversations, batch.image_counts, strict=True)):
        markers = sum(turn["text"].count(IMAGE_MARKER) for turn in turns if turn["role"] == "user")
        if markers != count:
            raise UserError("", f"{markers} {IMAGE_MARKER} markers", f"{count}, one for each image of the row", row=row)
