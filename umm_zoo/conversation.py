"""Conversations and tasks: turns with markers for images, and what a row asks for.

Without torch, so that commands that only handle texts start at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal, TypedDict

#: Stands in the text of a user turn where an image goes; the k-th marker of a row is the row's k-th image.
IMAGE_MARKER = "<image>"


class Turn(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


Conversation = list[Turn]

#: Half of a trajectory of interleaved reasoning, and what a row of it trains: its text, its image, or both.
Trajectory = Literal[
    "initial_understanding", "initial_generation", "initial_full",
    "improving_understanding", "improving_generation", "improving_full",
]  # fmt: skip


def split_answer(conversation: Conversation) -> tuple[Conversation, str]:
    """Split a conversation into (everything before the last assistant turn, that turn's text)."""
    for index in range(len(conversation) - 1, -1, -1):
        if conversation[index]["role"] == "assistant":
            return conversation[:index], conversation[index]["text"]
    return conversation, ""


def repeat_markers(conversation: Conversation, counts: Sequence[int]) -> Conversation:
    """The same with the marker of each image as often as that image has parts that are images of their own."""
    if max(counts, default=1) == 1:
        return conversation
    parts = iter(counts)

    def repeated(turn: Turn) -> Turn:
        pieces = turn["text"].split(IMAGE_MARKER)
        text = pieces[0] + "".join(IMAGE_MARKER * next(parts) + piece for piece in pieces[1:])
        return Turn(role=turn["role"], text=text)

    return [repeated(turn) if turn["role"] == "user" else turn for turn in conversation]


def user_text(conversation: Conversation) -> str:
    """What the user says, a line per turn."""
    return "\n".join(turn["text"] for turn in conversation if turn["role"] == "user")


class Task(StrEnum):
    """Request of a row."""

    TEXT_TO_IMAGE = "text_to_image"
    EDIT = "edit"  #: change the one input image as an instruction says
    COMPOSE = "compose"  #: one image of several input images
    RECONSTRUCT = "reconstruct"  #: the input image again
    UNCONDITIONAL = "unconditional"  #: any image
    CAPTION = "caption"
    QUESTION = "question"


def task_of(num_images: int, has_target: bool) -> Task:
    """Task of a row with that many input images, if nothing else is said."""
    if not has_target:
        return Task.QUESTION
    return Task.TEXT_TO_IMAGE if num_images == 0 else Task.EDIT if num_images == 1 else Task.COMPOSE
