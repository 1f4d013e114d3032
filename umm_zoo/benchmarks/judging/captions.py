"""Comparison of captions of an image by a judge: Unified-Bench's second protocol."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from torch import Tensor

from umm_zoo.benchmarks.judging.judge import Judge, Question
from umm_zoo.errors import UserError, several
from umm_zoo.generation.tensors import to_pil

Choice = Literal["first", "second", "tie"]
#: Outcomes by the choices with one's own caption first and second; every other pair of choices is a tie.
DECIDED: dict[tuple[Choice, Choice], str] = {("first", "second"): "win", ("second", "first"): "loss"}

#: The question to a judge: our words for the paper's criteria, of which it states three.
QUESTION = """Two captions, A and B, describe the image. Judge them.
1. Score each from 1 to 10 for comprehensiveness, richness and accuracy; for fluency; for semantic and compositional insight.
2. Compare them head to head. What a caption claims but the image does not show counts against it.
3. End with a last line that is one letter: A if A is better, B if B is better, T if neither is.

A: {first}

B: {second}"""


def verdict(answer: str) -> Choice:
    """The last line's letter.

    Raises:
        ValueError: the judge gave none.
    """
    last = next((line for line in reversed(answer.splitlines()) if line.strip()), "")
    found = re.fullmatch(r"\W*(?:(?:final|answer|verdict|winner)\W*)*([ABT])\W*", last.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError("its last line is no letter")
    letters: dict[str, Choice] = {"A": "first", "B": "second", "T": "tie"}
    return letters[found[1].upper()]


def both_orders(image: Image.Image, own: str, other: str) -> list[Question]:
    """The question about two captions of an image, one's own first and second."""
    return [Question((image, QUESTION.format(first=first, second=second))) for first, second in ((own, other), (other, own))]


def outcome(straight: Choice | None, swapped: Choice | None) -> str:
    """``win``, ``loss``, ``tie``, or ``invalid`` where a choice is missing."""
    if straight is None or swapped is None:
        return "invalid"
    return DECIDED.get((straight, swapped), "tie")


@dataclass(frozen=True)
class Comparison:
    """Outcome of one set of captions against another.

    Args:
        wins, ties, losses: images; a tie is also where the judge's choice followed the place of a caption.
        invalid: images for which the judge gave no answer, or none with a verdict; they count nowhere else.
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
    questions = [q for image, mine, theirs in zip(shown, own, other, strict=True) for q in both_orders(image, mine, theirs)]
    choices = [reply.value for reply in judge.ask_all(questions, verdict)]
    outcomes = Counter(map(outcome, choices[::2], choices[1::2]))
    firsts = [choice == "first" for choice in choices if choice in ("first", "second")]
    share = sum(firsts) / len(firsts) if firsts else 0.5
    return Comparison(outcomes["win"], outcomes["tie"], outcomes["loss"], outcomes["invalid"], share)
