"""Contrastive losses of images and texts, and hard negatives: texts that differ from the right one in one attribute."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.by_shape import diagonal, numbers
from umm_zoo.errors import several


class ContrastiveLoss(nn.Module, ABC):
    """A loss over all pairs of a batch.

    Shape:
        - images, texts: ``[B, F]`` unit vectors; row i of both belongs together
        - negatives: ``[B, K, F]`` unit vectors of texts that are wrong about image i; K may be 0
        - scale, bias: ``[]``, of the logits ``scale * cosine + bias``
        - same: ``[B, B]`` bool, True where text j is just as true of image i as its own (equal captions), the diagonal included
        - valid: ``[B, K]`` bool, False where a row has fewer than K negatives
        - output: ``[]``
    """

    def forward(
        self, images: Tensor, texts: Tensor, negatives: Tensor, scale: Tensor, bias: Tensor, same: Tensor, valid: Tensor
    ) -> Tensor:
        """The mean loss."""
        logits = scale * images @ texts.T + bias  # [B, B]
        wrong = scale * torch.einsum("bf,bkf->bk", images, negatives) + bias  # [B, K]
        own = diagonal(images.device, len(images))
        return self.loss(logits, wrong, own, same & ~own, valid)

    @abstractmethod
    def loss(self, logits: Tensor, wrong: Tensor, own: Tensor, twins: Tensor, valid: Tensor) -> Tensor:
        """The mean loss of logits.

        Shape:
            - logits: ``[B, B]``, images by texts; wrong: ``[B, K]``, images by their own negatives
            - own, twins: ``[B, B]`` bool, a row's own text, and others that are just as true
            - valid: ``[B, K]`` bool
        """


class SoftmaxContrast(ContrastiveLoss):
    """Symmetric InfoNCE (Radford et al., 2021, arXiv 2103.00020, figure 3), the row's own hard negatives among its texts.

    The extra texts stand in the image-to-text direction alone, as in NegCLIP (Yuksekgonul et al., 2023, arXiv 2210.01936): they
    have no image of their own.
    """

    def loss(self, logits: Tensor, wrong: Tensor, own: Tensor, twins: Tensor, valid: Tensor) -> Tensor:
        """Cross-entropy against the own text and the own image; equally true ones are left out of the sum."""
        logits = logits.masked_fill(twins, float("-inf"))
        wrong = wrong.masked_fill(~valid, float("-inf"))
        labels = numbers(logits.device, len(logits))
        return 0.5 * (F.cross_entropy(torch.cat([logits, wrong], dim=1), labels) + F.cross_entropy(logits.T, labels))


class SigmoidContrast(ContrastiveLoss):
    """Every pair is a yes-or-no question (Zhai et al., 2023, arXiv 2303.15343, equation 2); hard negatives are B·K further noes."""

    def loss(self, logits: Tensor, wrong: Tensor, own: Tensor, twins: Tensor, valid: Tensor) -> Tensor:
        """Sum of the log losses over the pairs, divided by B as in the paper."""
        losses = F.softplus(torch.where(own, -logits, logits)).masked_fill(twins, 0.0)
        return (losses.sum() + F.softplus(wrong).masked_fill(~valid, 0.0).sum()) / len(logits)


class WordSwaps:
    """Texts that are almost, but not, true of a row's image: its own with one word exchanged for another of its group.

    Without them a contrastive encoder ignores small objects: the other texts of a batch differ in so much that it need not look.

    Args:
        groups: lists of words (or phrases) that exclude each other, such as ``[small, large]``.
        num: texts per row; fewer where a text holds no such word.

    Raises:
        ValueError: a group has fewer than two words.
    """

    def __init__(self, groups: list[list[str]], num: int = 4) -> None:
        for group in groups:
            several("WordSwaps.groups", group)
        if any(len(group) < 2 for group in groups):
            raise ValueError(f"WordSwaps.groups: found {groups}, expected lists of two words or more")
        self.num = num
        self.others = {word: [other for other in group if other != word] for group in groups for word in group}
        longest_first = sorted(self.others, key=len, reverse=True)
        self.pattern = re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")\b")

    def of(self, texts: list[str], generator: torch.Generator | None = None) -> list[list[str]]:
        """For each row up to ``num`` wrong texts; different places of the text are changed, as far as it has enough."""
        several("texts", texts)
        return [self._swaps(text, generator) for text in texts]

    def count(self, texts: list[str]) -> int:
        """How many of the texts have a wrong one, which no draw decides."""
        return sum(self.num > 0 and self.pattern.search(text) is not None for text in texts)

    def _swaps(self, text: str, generator: torch.Generator | None) -> list[str]:
        places = list(self.pattern.finditer(text))
        changed = []
        for index in torch.randperm(len(places), generator=generator)[: self.num].tolist():
            place = places[index]
            others = self.others[place.group()]
            word = others[int(torch.randint(len(others), (), generator=generator))]
            changed.append(text[: place.start()] + word + text[place.end() :])
        return changed
