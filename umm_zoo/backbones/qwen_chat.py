"""The chat template of the Qwen2-VL family."""

from __future__ import annotations

from umm_zoo.backbones.templates import ChatML, Piece
from umm_zoo.batch import Conversation

#: The system turn that the published template puts before a conversation that has none.
SYSTEM_PROMPT = "You are a helpful assistant."


class QwenChat(ChatML):
    """ChatML with every image between ``<|vision_start|>`` and ``<|vision_end|>``.

    Args:
        system: system text of conversations that bring none (default: the published template's); None for no system turn.
    """

    image = "<|image_pad|>"

    def __init__(self, system: str | None = SYSTEM_PROMPT) -> None:
        super().__init__(system)

    def render(self, conversation: Conversation, for_generation: bool = False) -> list[Piece]:
        """The turns one after the other.

        Raises:
            ValueError: ``for_generation`` after an assistant turn.
        """
        if for_generation and conversation and conversation[-1]["role"] == "assistant":
            raise ValueError(f"the conversation ends with an answer, nothing is left to say: '{conversation[-1]['text'][:60]}'")
        pieces: list[Piece] = []
        for piece in super().render(conversation, for_generation):
            around = piece.kind == "image"
            pieces += [Piece("special", "<|vision_start|>"), piece, Piece("special", "<|vision_end|>")] if around else [piece]
        return pieces
