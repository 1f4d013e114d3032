"""Conversations: turns with markers for images. Without torch, so that commands that only handle texts start at once."""

from __future__ import annotations

from typing import Literal, TypedDict

#: Stands in the text of a user turn where an image goes; the k-th marker of a row is the row's k-th image.
IMAGE_MARKER = "<image>"


class Turn(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


Conversation = list[Turn]


def split_answer(conversation: Conversation) -> tuple[Conversation, str]:
    """Split a conversation into (everything before the last assistant turn, that turn's text)."""
    for index in range(len(conversation) - 1, -1, -1):
        if conversation[index]["role"] == "assistant":
            return conversation[:index], conversation[index]["text"]
    return conversation, ""
