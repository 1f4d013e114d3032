"""Comparison of captions of an image by a judge: Unified-Bench's second protocol."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from torch import Tensor

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.batch import IMAGE_MARKER, Turn
from umm_zoo.callbacks.samples import from_pil, to_pil
from umm_zoo.errors import Count, Positive, UserError, several

Verdict = Literal["first", "second", "tie"]
#: Outcomes by the verdicts with one's own caption first and second; every other pair of verdicts is a tie.
DECIDED: dict[tuple[Verdict | None, Verdict | None], str] = {("first", "second"): "win", ("second", "first"): "loss"}

#: The question to a judge: our words for the paper's criteria, of which it states three.
QUESTION = """Two captions, A and B, describe the image. Judge them.
1. Score each from 1 to 10 for comprehensiveness, richness and accuracy; for fluency; for semantic and compositional insight.
2. Compare them head to head. What a caption claims but the image does not show counts against it.
3. End with a last line that is one letter: A if A is better, B if B is better, T if neither is.

A: {first}

B: {second}"""


class Judge(ABC):
    """Model that answers a question about an image in words."""

    @abstractmethod
    def ask(self, image: Image.Image, question: str) -> str:
        """The answer."""


class LocalJudge(Judge):
    """Vision-language model of this package as a judge."""

    def __init__(self, vlm: VLMBackbone, max_new_tokens: Count = 512) -> None:
        self.vlm, self.max_new_tokens = vlm.eval(), max_new_tokens

    def ask(self, image: Image.Image, question: str) -> str:
        """Greedy."""
        pixels = from_pil(image)[None]
        text = question.replace(IMAGE_MARKER, "")
        return self.vlm.generate([[Turn(role="user", text=f"{IMAGE_MARKER}\n{text}")]], pixels, [1], self.max_new_tokens)[0]


class EndpointJudge(Judge):
    """Server that speaks OpenAI's chat protocol as a judge; the images and captions are sent to it.

    Args:
        url: base address, such as ``http://localhost:8000/v1``.
        model: name that the server knows.
        key_variable: environment variable that holds the key; unset or empty sends none.
        max_tokens, timeout: of one answer, the latter in seconds.
    """

    def __init__(
        self, url: str, model: str, key_variable: str = "OPENAI_API_KEY", max_tokens: Count = 1024, timeout: Positive = 120.0
    ) -> None:
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.max_tokens, self.timeout = max_tokens, timeout

    def ask(self, image: Image.Image, question: str) -> str:
        """One request, at temperature 0; a ``ConnectionError`` where no server is there, or it gives anything but an answer."""
        stored = io.BytesIO()
        image.convert("RGB").save(stored, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"])
        except (urllib.error.URLError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ConnectionError(f"{self.url}: found no answer of a judge ({type(error).__name__}: {error})") from error


def verdict(answer: str) -> Verdict | None:
    """The last line's letter; None where the judge gave none."""
    last = next((line for line in reversed(answer.splitlines()) if line.strip()), "")
    found = re.fullmatch(r"\W*(?:(?:final|answer|verdict|winner)\W*)*([ABT])\W*", last.strip(), re.IGNORECASE)
    return None if found is None else {"A": "first", "B": "second", "T": "tie"}[found[1].upper()]  # type: ignore[return-value]


@dataclass(frozen=True)
class Comparison:
    """Outcome of one set of captions against another.

    Args:
        wins, ties, losses: images; a tie is also where the judge's choice followed the place of a caption.
        invalid: images for which an answer had no verdict; they count nowhere else.
        first_share: share of all verdicts that chose the caption shown first; .5 is a judge without a habit.
    """

    wins: int
    ties: int
    losses: int
    invalid: int
    first_share: float

    @property
    def win_rate(self) -> float:
        """Wins and half of the ties, over all valid images; NaN without any."""
        valid = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / valid if valid else float("nan")


def compare_captions(judge: Judge, images: Tensor | Sequence[Image.Image], own: Sequence[str], other: Sequence[str]) -> Comparison:
    """Let a judge compare two captions of each image, in both orders: only a choice that survives the swap is a win or a loss.

    Tensors are ``[B, 3, H, W]`` in [-1, 1]; a ``ValueError`` where the numbers of images and captions differ.
    """
    several("own", own)
    several("other", other)
    if not isinstance(images, Tensor):
        several("images", images, Image.Image)
    elif images.ndim != 4:
        raise UserError("images", f"a tensor {list(images.shape)}", "[B, 3, H, W]")
    shown = [to_pil(image) if isinstance(image, Tensor) else image for image in images]
    if not len(shown) == len(own) == len(other):
        raise ValueError(f"compare_captions: found {len(shown)} images, {len(own)} and {len(other)} captions")
    outcomes: Counter[str] = Counter()
    firsts: list[bool] = []
    for image, mine, theirs in zip(shown, own, other, strict=True):
        straight = verdict(judge.ask(image, QUESTION.format(first=mine, second=theirs)))
        swapped = verdict(judge.ask(image, QUESTION.format(first=theirs, second=mine)))
        firsts += [found == "first" for found in (straight, swapped) if found in ("first", "second")]
        outcomes["invalid" if None in (straight, swapped) else DECIDED.get((straight, swapped), "tie")] += 1
    share = sum(firsts) / len(firsts) if firsts else 0.5
    return Comparison(outcomes["win"], outcomes["tie"], outcomes["loss"], outcomes["invalid"], share)
