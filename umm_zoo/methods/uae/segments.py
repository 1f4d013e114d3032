"""Settings of rollouts whose samples have two segments, a caption and images of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from umm_zoo.errors import Count, Weight

#: Caption tokens, or image tokens.
Segment = Literal["text", "image"]
SEGMENTS: tuple[Segment, ...] = ("text", "image")


@dataclass(frozen=True)
class SegmentWeights:
    """Weights of caption and image tokens in the loss.

    Args:
        text, image: of the advantages of each segment, whose loss is a mean of its own: over captions as the objective aggregates
            them, and over all image tokens. 1 and 1 in ULM-R1.
        concatenated: the tokens of a caption and of an image of it are one answer, which the objective aggregates. With
            ``TokenMean`` that is T2I-R1's loss, in which a caption of 100 tokens is 15 % of itself and an image of 576.
    """

    text: Weight = 1.0
    image: Weight = 1.0
    concatenated: bool = False


@dataclass(frozen=True)
class ImageSampling:
    """Number of a caption's images in training, and how their tokens are scored.

    Args:
        per_caption: K, whose mean reward is the caption's.
        compared: what images have advantages among where K is above 1: those of their own ``caption``, while captions are compared
            by their means (our choice); or all G K of their ``row``, of which a caption has the mean advantage (T2I-R1).
        scoring: ``guided``, under the distribution that the tokens were drawn from, with a gradient into both rows of guidance; or
            ``conditional``, under the row with the caption alone (T2I-R1, ULM-R1), which with guidance has a bias: prefixes that do
            better than their group are pushed towards the guided distribution, whatever was drawn.
    """

    per_caption: Count = 1
    compared: Literal["caption", "row"] = "caption"
    scoring: Literal["guided", "conditional"] = "guided"
