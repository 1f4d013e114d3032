"""Readers of captions: the choice of the language model's states that stand for a caption."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.prefix import evaluation_mode
from umm_zoo.backbones.templates import IGNORE
from umm_zoo.batch import IMAGE_MARKER, Conversation, Images, Tokens, Turn
from umm_zoo.errors import several


class CaptionReader(ABC):
    """Base class of readers: the language model's states that stand for a caption.

    They carry no gradient: a decoder trains the model by reward only.
    """

    with_adapter: ClassVar[bool] = True  #: whether the policy's adapter takes part, or the model reads as it was before

    @abstractmethod
    def states(self, vlm: LibraryVLM, captions: Sequence[str], images: Images | None) -> Tokens:
        """The states ``[R, N, D]`` of R captions with their mask; the images are what they describe, None for a negative prompt."""

    def __call__(self, vlm: LibraryVLM, captions: Sequence[str], images: Images | None, adapter: LoRA | None = None) -> Tokens:
        """``states`` without gradient, with or without the policy's adapter."""
        several("captions", captions)
        off = adapter.disabled() if adapter is not None and not self.with_adapter else nullcontext()
        with torch.no_grad(), evaluation_mode(vlm), off:
            return self.states(vlm, captions, images)


class TextOnlyReader(CaptionReader):
    """Reader of the caption alone, as a turn of its own role: the pure auto-encoder, in which text is all that passes.

    As in the released demo: the role is the literal ``generate``, the template's system turn stands before it and the opening of an
    answer behind, and the whole sequence of last-layer states counts, template tokens included.

    Args:
        role: of the turn.
    """

    def __init__(self, role: str = "generate") -> None:
        self.role = role

    def states(self, vlm: LibraryVLM, captions: Sequence[str], images: Images | None) -> Tokens:
        """See ``CaptionReader``; the images are not looked at."""
        conversations = [[_turn(self.role, caption)] for caption in captions]
        inputs = vlm.embed(conversations, None, [0] * len(captions), for_generation=True)
        return Tokens(vlm(inputs).hidden, inputs.mask)


class BaseTextReader(TextOnlyReader):
    """``TextOnlyReader`` by the model without the policy's adapter, so that training changes nothing but the text.

    In the paper the same weights write and read, and the condition drifts while the policy learns. Here what a reward gains can
    only have come through the words.
    """

    with_adapter = False


class AnswerStatesReader(CaptionReader):
    """Reader of the states at the caption's own tokens while the image is looked at, as in UAE's released cold start.

    They have attended to the image, so more than text passes: what is generated is no proof of what the caption says. Texts without
    an image are read as answers to the prompt alone.

    Args:
        prompt: before the caption.
    """

    def __init__(self, prompt: str = "Describe the image.") -> None:
        self.prompt = prompt

    def states(self, vlm: LibraryVLM, captions: Sequence[str], images: Images | None) -> Tokens:
        """See ``CaptionReader``."""
        marker = f"{IMAGE_MARKER}\n" if images is not None else ""
        conversations: list[Conversation] = [
            [_turn("user", self.prompt, marker), _turn("assistant", caption)] for caption in captions
        ]
        inputs = vlm.embed(conversations, images, [0 if images is None else 1] * len(captions))
        hidden, wanted = vlm(inputs).hidden, inputs.labels != IGNORE  # [R, L, D], [R, L]
        lengths = wanted.sum(dim=1).tolist()
        order = torch.argsort(~wanted, dim=1, stable=True)[:, : max(lengths)]  # answer tokens first, in their order
        mask = torch.take_along_dim(wanted, order, dim=1) if min(lengths) < max(lengths) else None
        return Tokens(torch.take_along_dim(hidden, order[..., None], dim=1), mask)


class RewriteReader(BaseTextReader):
    """Reader of a prompt's own tokens and what closes its turn, as the text encoder of Qwen-Image reads the rewrite of a thought.

    Think-Then-Generate generates from the rewritten prompt in a new conversation: the states have seen neither the user's prompt
    nor the reasoning. What stands before the prompt (system turn, opening of the user's; 34 tokens in Qwen-Image) is read too but
    not handed on. By the model without its adapter, or the decoder's condition would drift while the model learns to think.

    Reference: "Think-Then-Generate" (arXiv 2601.10332) and its released code; diffusers' ``QwenImagePipeline``.

    Args:
        role: of the turn.
    """

    def __init__(self, role: str = "user") -> None:
        super().__init__(role)

    def states(self, vlm: LibraryVLM, captions: Sequence[str], images: Images | None) -> Tokens:
        """See ``CaptionReader``; the images are not looked at."""
        inputs = vlm.embed([[_turn(self.role, caption)] for caption in captions], None, [0] * len(captions), for_generation=True)
        kept = inputs.attention_mask & (inputs.attention_mask.cumsum(dim=1) > self._before(vlm))
        longest = int(kept.sum(dim=1).max())
        hidden, mask = vlm(inputs).hidden[:, -longest:], kept[:, -longest:]  # prompts are padded on the left
        return Tokens(hidden, None if bool(mask.all()) else mask)

    def _before(self, vlm: LibraryVLM) -> int:
        """Tokens that stand before every prompt."""
        one, other = (vlm.embed([[_turn(self.role, text)]], None, [0], for_generation=True).token_ids[0].tolist() for text in "xQ")
        return next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])


def _turn(role: str, text: str, marker: str = "") -> Turn:
    return {"role": role, "text": marker + text.replace(IMAGE_MARKER, "")}  # type: ignore[typeddict-item]
