"""Masking of image tokens: how many are hidden in training, and in which order and how many at a time they are generated."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from umm_zoo.errors import Count, Positive, Share, UserError, Weight


class MaskRatio(ABC):
    """Shares of the tokens of each row that are hidden in training.

    A subclass implements ``ratios`` and, where the release does not round to the nearest number, ``count``.
    """

    @abstractmethod
    def ratios(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """One draw per row, ``[rows]`` in (0, 1], on the CPU."""

    def count(self, ratios: Tensor, num_tokens: int) -> Tensor:
        """Tokens hidden in each row, at least one, ``[rows]`` long: the nearest number, as in Show-o and MMaDA."""
        return (num_tokens * ratios).round().long().clamp(1, num_tokens)

    def masks(self, rows: int, num_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        """Places to hide, ``[rows, num_tokens]`` bool on the CPU: the first of a random order of each row."""
        counts = self.count(self.ratios(rows, generator), num_tokens)
        return random_places(torch.rand(rows, num_tokens, generator=generator), counts)


class TruncatedNormalRatio(MaskRatio):
    """Normal distribution about 1, cut off to [``low``, 1], of which the next larger number of tokens is hidden.

    Reference: Li et al., "Autoregressive Image Generation without Vector Quantization" (MAR, arXiv 2406.11838), released code. At
    the defaults the mean is .8670 and the deviation .0835.

    Args:
        low: smallest ratio.
        std: deviation before the cut.
        shared: one draw for all rows of a batch, as in the release; one for each is our choice.
    """

    def __init__(self, low: Share = 0.7, std: Positive = 0.25, shared: bool = False) -> None:
        self.low, self.std, self.shared = low, std, shared

    def ratios(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """By the inverse of the distribution function."""
        smallest = torch.special.ndtr(torch.tensor((self.low - 1) / self.std, dtype=torch.float64))
        uniform = torch.rand(1 if self.shared else rows, generator=generator, dtype=torch.float64)
        quantiles = smallest + (0.5 - smallest) * uniform
        return (1 + self.std * torch.special.ndtri(quantiles)).clamp(max(self.low, 1e-9), 1).expand(rows)

    def count(self, ratios: Tensor, num_tokens: int) -> Tensor:
        """The next larger number."""
        return (num_tokens * ratios - 1e-9).ceil().long().clamp(1, num_tokens)  # a ratio of .7 of 10 is 7


class CosineRatio(MaskRatio):
    """Ratio cos(pi t / 2) at uniform t, whose mean is 2 / pi (MaskGIT; Show-o, arXiv 2408.12528, released code)."""

    def ratios(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """t is below 1."""
        return torch.cos(math.pi / 2 * torch.rand(rows, generator=generator, dtype=torch.float64))


class UniformRatio(MaskRatio):
    """Every ratio alike, as MMaDA hides text (arXiv 2505.15809)."""

    def ratios(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniform in (0, 1]."""
        return 1 - torch.rand(rows, generator=generator, dtype=torch.float64)


class Unmasking(ABC):
    """Numbers of tokens that are generated in each of K rounds, and how strongly each round is guided.

    Args:
        num_rounds: K, where a call does not say another.
        guidance: ``constant`` (Harmon, Show-o), or ``linear``: in proportion to the tokens that are known behind the round (MAR).
    """

    def __init__(self, num_rounds: Count = 64, guidance: Literal["constant", "linear"] = "constant") -> None:
        self.num_rounds, self.guidance = num_rounds, guidance

    def scales(self, scale: float, counts: Sequence[int]) -> list[float]:
        """Scale of guidance in each of the rounds that generate these numbers of tokens, ``1 + (scale - 1) known / N``.

        As in MAR's release the last round counts one token less than it leaves.
        """
        if self.guidance == "constant":
            return [scale] * len(counts)
        total = sum(counts)
        return [1 + (scale - 1) * min(known, total - 1) / total for known in accumulate(counts)]

    @abstractmethod
    def hidden(self, step: int, num_rounds: int, num_tokens: int) -> int:
        """Tokens that should still be hidden behind round ``step`` of 1 … K."""

    def counts(self, num_tokens: int, num_rounds: int | None = None) -> list[int]:
        """Tokens of each round; at least one, and all in the end.

        Raises:
            UserError: more rounds than tokens.
        """
        rounds = num_rounds or self.num_rounds
        if rounds > num_tokens:
            raise UserError("num_rounds", f"{rounds} rounds for {num_tokens} tokens", "at most one round a token")
        left, made = num_tokens, []
        for step in range(1, rounds):
            now = min(max(self.hidden(step, rounds, num_tokens), rounds - step), left - 1)
            made.append(left - now)
            left = now
        return [*made, left]


class CosineUnmasking(Unmasking):
    """floor(N cos(pi k / 2K)) tokens are hidden behind round k: few are generated at first (MaskGIT; MAR, Harmon, Show-o).

    Args:
        num_rounds: K; 64 in MAR and Harmon, 12 to 18 in Show-o.
        guidance: see the base class.
    """

    def hidden(self, step: int, num_rounds: int, num_tokens: int) -> int:
        """By the cosine."""
        return math.floor(num_tokens * math.cos(math.pi * step / (2 * num_rounds)))


class Order(ABC):
    """Choice of the tokens that a round keeps, among those that are hidden."""

    @abstractmethod
    def scores(self, step: int, num_rounds: int, uniform: Tensor, log_probs: Tensor | None = None) -> Tensor:
        """Rank of each token, ``[R, N]``; the highest of the hidden ones are kept.

        Args:
            step: the round, 1 … K.
            num_rounds: K.
            uniform: ``[R, N]`` in [0, 1), other draws in each round.
            log_probs: ``[R, N]`` of the tokens that the round has drawn; None where they are continuous.
        """


class RandomOrder(Order):
    """Every order alike, as in MAR and Harmon: a continuous token has no confidence."""

    def scores(self, step: int, num_rounds: int, uniform: Tensor, log_probs: Tensor | None = None) -> Tensor:
        """The random numbers themselves."""
        return uniform


class ConfidenceOrder(Order):
    """The likeliest tokens first: ``log p + temperature * Gumbel noise``, with a temperature that falls to 0.

    Behind round k of K it is ``temperature * (1 - k / K)``. The released code of Show-o and MMaDA multiplies it by that factor in
    each round again, which is ``schedule="product"``.

    Args:
        temperature: 1 in Show-o.
        schedule: ``linear`` (as the papers say), or ``product`` for parity.
    """

    def __init__(self, temperature: Weight = 1.0, schedule: Literal["linear", "product"] = "linear") -> None:
        self.temperature, self.schedule = temperature, schedule

    def temperature_at(self, step: int, num_rounds: int) -> float:
        """That of round ``step``."""
        first = step if self.schedule == "linear" else 1
        return self.temperature * math.prod(1 - past / num_rounds for past in range(first, step + 1))

    def scores(self, step: int, num_rounds: int, uniform: Tensor, log_probs: Tensor | None = None) -> Tensor:
        """See the class.

        Raises:
            ValueError: tokens without probabilities.
        """
        if log_probs is None:
            raise ValueError("ConfidenceOrder: found tokens without probabilities, expected RandomOrder for continuous ones")
        tiny = torch.finfo(uniform.dtype).tiny
        gumbel = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
        return log_probs + self.temperature_at(step, num_rounds) * gumbel


def random_places(uniform: Tensor, counts: Tensor | int) -> Tensor:
    """The ``counts`` ``[B]`` highest of each row of ``[B, N]``, as a mask."""
    ranks = uniform.argsort(dim=1, descending=True).argsort(dim=1)
    return ranks < (counts if isinstance(counts, int) else counts[:, None])


def kept_places(scores: Tensor, hidden: Tensor, count: int) -> Tensor:
    """The ``count`` hidden places ``[R, N]`` of each row with the highest scores, as a mask."""
    return random_places(scores.masked_fill(~hidden, -torch.inf), count)
