"""Prompt of UAE's captioner, and the sampling of its captions."""

from __future__ import annotations

from dataclasses import dataclass

from umm_zoo.batch import IMAGE_MARKER, Conversation, Turn

#: Prompt of the captioner, word for word as released (two blanks at two ends of lines and asterisks included); the image is last.
CAPTION_PROMPT = (
    "You are an expert vision-language model.  \n"
    "Your task is: Given an input image, generate a **textual description** of the image. "
    'If there is text in the image, transcribe it inside double quotes "".  \n'
    f"Now, carefully analyze the input image and output the full description. {IMAGE_MARKER}"
)


@dataclass(frozen=True)
class CaptionSampling:
    """Prompt and sampling of captions, in training and validation alike.

    Args:
        prompt: asks for the caption, with one ``<image>``; the released one by default.
        max_new_tokens: longest caption; 512 in the released demo.
        temperature: 1 in the paper's reinforcement.

    Raises:
        ValueError: the prompt has no or several markers.
    """

    prompt: str = CAPTION_PROMPT
    max_new_tokens: int = 512
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.prompt.count(IMAGE_MARKER) != 1:
            raise ValueError(f"prompt: found {self.prompt.count(IMAGE_MARKER)} {IMAGE_MARKER} markers, expected one")

    def conversations(self, count: int) -> list[Conversation]:
        """The question, once per image."""
        return [[Turn(role="user", text=self.prompt)] for _ in range(count)]
