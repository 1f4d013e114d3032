"""Chat templates: conversations as pieces of text, special tokens and images, some of them trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from umm_zoo.batch import IMAGE_MARKER, Conversation, Turn

#: Label of a position that carries no loss, the convention of torch's and transformers' cross-entropy.
IGNORE = -100
#: The system turn that Qwen's published template puts before a conversation that has none.
SYSTEM_PROMPT = "You are a helpful assistant."


class Piece(NamedTuple):
    """A run of text, one special token, or one image (whose text is empty)."""

    kind: Literal["text", "special", "image"]
    text: str = ""
    trained: bool = False


class ChatTemplate(ABC):
    """The form a language model was, or is going to be, trained on.

    Attributes:
        end: what closes an answer: a special token of the tokenizer or plain text. Generation stops there.
        around_image: special tokens that open and close an image; none where it stands without.
    """

    end: str
    around_image: tuple[Piece, ...] = ()

    def first_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens before every conversation that does not open with the tokenizer's first token itself."""
        return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]

    @abstractmethod
    def render(self, conversation: Conversation, for_generation: bool = False) -> list[Piece]:
        """Every answer and what closes it is trained. ``for_generation`` ends with the opening of an assistant turn."""

    def image_prompt(self, text: str) -> list[Piece]:
        """A text that asks for an image, up to the token that opens it."""
        return [*self.render([Turn(role="user", text=text)], for_generation=True), *self.around_image[:1]]


class ChatML(ChatTemplate):
    """``<|im_start|>role\\ntext<|im_end|>\\n`` per turn: the form of Qwen's chat models, and our choice for small ones.

    Args:
        system: system text of conversations that bring none; None for no system turn.
    """

    end = "<|im_end|>"

    def __init__(self, system: str | None = None) -> None:
        self.system = system

    def render(self, conversation: Conversation, for_generation: bool = False) -> list[Piece]:
        """The turns one after the other."""
        turns = [(turn["role"], turn["text"]) for turn in conversation]
        if self.system is not None and not any(role == "system" for role, _ in turns):
            turns.insert(0, ("system", self.system))
        pieces: list[Piece] = []
        for role, text in turns:
            trained = role == "assistant"
            pieces += [Piece("special", "<|im_start|>"), Piece("text", f"{role}\n")]
            pieces += [Piece("text", text, True)] if trained else split_images(text, *self.around_image)
            pieces += [Piece("special", self.end, trained), Piece("text", "\n")]
        return [*pieces, Piece("special", "<|im_start|>"), Piece("text", "assistant\n")] if for_generation else pieces


class QwenChat(ChatML):
    """ChatML of Qwen2-VL and its successors: every image stands between ``<|vision_start|>`` and ``<|vision_end|>``.

    Args:
        system: system text of conversations that bring none (default: the published template's); None for no system turn.
    """

    image = "<|image_pad|>"
    around_image = (Piece("special", "<|vision_start|>"), Piece("special", "<|vision_end|>"))

    def __init__(self, system: str | None = SYSTEM_PROMPT) -> None:
        super().__init__(system)


class JanusChat(ChatTemplate):
    """``<|User|>: question\\n\\n<|Assistant|>: answer<｜end▁of▁sentence｜>``, the form of Janus's releases (arXiv 2501.17811).

    A system text stands before questions, and none before a text that asks for an image. The blank before an answer is trained with
    it, since tokenizers join the two.

    Args:
        user, assistant: names of the two roles: special tokens in Janus-Pro, ``User`` and ``Assistant`` in Janus-1.3B.
        system: system text of conversations that bring none; the default is the release's, an empty one puts none.
    """

    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    around_image = (Piece("special", "<begin_of_image>"), Piece("special", "<end_of_image>"))

    def __init__(
        self,
        user: str = "<|User|>",
        assistant: str = "<|Assistant|>",
        system: str = "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language.",
    ) -> None:
        self.roles, self.system = {"user": user, "assistant": assistant}, system

    def render(self, conversation: Conversation, for_generation: bool = False) -> list[Piece]:
        """The system text, then user and assistant in turn."""
        system = next((turn["text"] for turn in conversation if turn["role"] == "system"), self.system)
        return [*([Piece("text", f"{system}\n\n")] if system else []), *self._turns(conversation, for_generation)]

    def image_prompt(self, text: str) -> list[Piece]:
        """The user's turn alone, as in the release's ``generation_inference.py``."""
        return [*self._turns([Turn(role="user", text=text)], True), *self.around_image[:1]]

    def _turns(self, conversation: Conversation, for_generation: bool) -> Iterator[Piece]:
        for turn in conversation:
            if turn["role"] == "user":
                yield from (self._role("user"), Piece("text", ": "))
                yield from split_images(turn["text"].strip(), *self.around_image)
                yield Piece("text", "\n\n")
            elif turn["role"] == "assistant":
                yield from (self._role("assistant"), Piece("text", ":"))
                yield from (Piece("text", f" {turn['text'].strip()}", True), Piece("special", self.end, True))
        if for_generation:
            yield from (self._role("assistant"), Piece("text", ":"))

    def _role(self, role: str) -> Piece:
        name = self.roles[role]
        return Piece("special" if name.startswith("<") else "text", name)


class VicunaV1(ChatTemplate):
    """``SYSTEM USER: question ASSISTANT: answer</s>``, stage 2 of LLaVA-1.5 (arXiv 2310.03744) with Vicuna.

    The blank before an answer is trained with it, since tokenizers join the two.

    Args:
        end: the tokenizer's end-of-text token.
        system: system text of conversations that bring none; the default is Vicuna's.
    """

    def __init__(
        self,
        end: str = "</s>",
        system: str = "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ) -> None:
        self.end, self.system = end, system

    def render(self, conversation: Conversation, for_generation: bool = False) -> list[Piece]:
        """The system text, then user and assistant in turn."""
        pieces = [Piece("text", next((turn["text"] for turn in conversation if turn["role"] == "system"), self.system))]
        for turn in conversation:
            if turn["role"] == "user":
                blank = "" if pieces[-1].text in ("", self.end) else " "
                pieces += [Piece("text", f"{blank}USER: "), *split_images(turn["text"])]
            elif turn["role"] == "assistant":
                pieces += [Piece("text", " ASSISTANT:"), Piece("text", f" {turn['text']}", True), Piece("special", self.end, True)]
        return [*pieces, Piece("text", " ASSISTANT:")] if for_generation else pieces


class Plain(ChatTemplate):
    """The images, then the caption and a line break: stage 1 of LLaVA-1.5 (arXiv 2310.03744). What the user says is dropped."""

    end = "\n"

    def render(self, conversation: Conversation, for_generation: bool = False) -> list[Piece]:
        """All images first, then the last answer."""
        pieces = [Piece("image")] * sum(turn["text"].count(IMAGE_MARKER) for turn in conversation if turn["role"] == "user")
        answers = [turn["text"] for turn in conversation if turn["role"] == "assistant"]
        return pieces if for_generation or not answers else [*pieces, Piece("text", answers[-1] + self.end, True)]


def split_images(text: str, *around: Piece) -> list[Piece]:
    """The text of a user turn with its image markers as pieces of their own, each between the two of ``around``, if given."""
    first, *others = text.split(IMAGE_MARKER)
    image = [*around[:1], Piece("image"), *around[1:]]
    return [Piece("text", first), *(piece for part in others for piece in (*image, Piece("text", part)))]
