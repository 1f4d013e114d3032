"""Autoregressive models over text and image tokens: the interface, guidance, and the prompts that guidance starts from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from umm_zoo.backbones.base import VLMBackbone, VLMInputs
from umm_zoo.backbones.by_shape import numbers
from umm_zoo.backbones.generation import join_rows
from umm_zoo.backbones.token_codec import TokenCodec
from umm_zoo.batch import Grid
from umm_zoo.errors import UserError


@dataclass
class ImageSamples:
    """Groups of generated images: R = B * G rows, those of one prompt next to each other. Every row has all of its N tokens
    of D codes.

    Shape:
        - ids: ``[R, N * D]`` long, in raster order, the D codes of a token next to each other.
        - log_probs: ``[R, N * D]``, of each code under the distribution it was drawn from, with guidance, temperature and top-k (at
          temperature 0: under that of temperature 1). No gradient.
    """

    ids: Tensor
    log_probs: Tensor


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Logits ``u + scale (c - u)`` of classifier-free guidance (Ho & Salimans, arXiv 2207.12598), ``[..., K]`` all."""
    return unconditional + scale * (conditional - unconditional)


class Unconditional(ABC):
    """Form of the prompt that says nothing, beside which guidance puts the real one."""

    @abstractmethod
    def __call__(self, token_ids: Tensor, mask: Tensor, pad_id: int, bos_id: int | None) -> tuple[Tensor, Tensor]:
        """Ids and mask of what stands in the place of prompts.

        Args:
            token_ids, mask: ``[B, L]``, left-padded, of prompts that begin with ``bos_id`` (if any) and end in begin-of-image.
            pad_id: the tokenizer's.
            bos_id: None where the tokenizer has none.

        Returns:
            (token_ids ``[B, L]``, mask ``[B, L]`` bool).
        """


class PaddedPrompt(Unconditional):
    """Padding as long as the prompt's own text, attended; padding of the batch stays masked, so that a row knows no other.

    That of Janus's release (``generation_inference.py``) for one prompt. Padding that is attended tells the prompt's length.
    """

    def __call__(self, token_ids: Tensor, mask: Tensor, pad_id: int, bos_id: int | None) -> tuple[Tensor, Tensor]:
        """Pads between the ends of each row."""
        kept = _ends(mask, bos_id is not None)
        return token_ids.where(kept, pad_id), mask


class AttendedPadding(PaddedPrompt):
    """That of Janus's release on a batch: nothing is masked, and a row depends on the longest prompt beside it."""

    def __call__(self, token_ids: Tensor, mask: Tensor, pad_id: int, bos_id: int | None) -> tuple[Tensor, Tensor]:
        """Pads between the ends of each row and before them."""
        ids, _ = super().__call__(token_ids, mask, pad_id, bos_id)
        return ids, torch.ones_like(mask)


class NullPrompt(Unconditional):
    """Begin-of-text (where the tokenizer has one) and begin-of-image alone: free of the prompt's length. Our choice."""

    def __call__(self, token_ids: Tensor, mask: Tensor, pad_id: int, bos_id: int | None) -> tuple[Tensor, Tensor]:
        """The two ends, next to each other."""
        ids, kept = torch.full_like(token_ids, pad_id), torch.zeros_like(mask)
        ids[:, -1], kept[:, -1] = token_ids[:, -1], True
        if bos_id is not None:
            ids[:, -2], kept[:, -2] = bos_id, True
        return ids, kept


def _ends(mask: Tensor, with_first: bool) -> Tensor:
    """True at the last token of left-padded rows and, if asked for, at the first, ``[B, L]``."""
    places = numbers(mask.device, mask.shape[1])
    first = mask.int().argmax(1)[:, None]  # [B, 1]
    return (places == mask.shape[1] - 1) | (places == first if with_first else torch.zeros_like(mask))


class UnifiedAR(VLMBackbone):
    """A vision-language model that also predicts the tokens of images, one after the other, with a head of their own.

    Letters: R = B * G rows of image tokens, the G images of one prompt next to each other; N tokens of D codes, K at most of each.
    Where D is 1, as in Janus, ids are those of the tokens.

    Attributes:
        codec: makes the tokens and the images of them.
        generated_size: side of the square images that it generates, in pixels.
        vocabulary: number of tokens that its text is made of.
    """

    codec: TokenCodec
    generated_size: int

    @property
    def generated_grid(self) -> Grid:
        """Cells of the images that it generates."""
        return self.codec.token_grid(self.generated_size, self.generated_size)

    @property
    def codes_per_token(self) -> int:
        """D."""
        return len(self.codec.code_sizes)

    @torch.no_grad()
    def images_of(self, ids: Tensor) -> Tensor:
        """Images ``[R, 3, H, W]`` of ids ``[R, N * D]``."""
        return self.codec.images(ids.unflatten(1, (-1, self.codes_per_token)), self.generated_grid)

    def assert_generates(self, size: Sequence[int], where: str) -> None:
        """Refuse images of another height and width than it generates.

        Raises:
            UserError: by the name ``where`` of the size.
        """
        if set(size) != {side := self.generated_size}:
            raise UserError(where, "{} x {} px".format(*size), f"{side} x {side}, what the model generates")

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """See above."""

    @abstractmethod
    def image_prompt(self, texts: Sequence[str]) -> VLMInputs:
        """Prompts for images, left-padded, each ending in the begin-of-image token.

        Raises:
            UserError: a text has more tokens than the language model has places.
        """

    @abstractmethod
    def check_image_prompts(self, texts: Sequence[str]) -> None:
        """Nothing, where ``image_prompt`` takes every text; no network runs.

        Raises:
            UserError: as ``image_prompt``, of the ``row``.
        """

    @abstractmethod
    def unconditional(self, inputs: VLMInputs) -> VLMInputs:
        """The prompts that say nothing, one for each of ``image_prompt``'s; see ``Unconditional``."""

    @abstractmethod
    def image_logits(self, inputs: VLMInputs, ids: Tensor) -> Tensor:
        """Logits of every code given those before it, differentiable.

        Args:
            inputs: B prompts.
            ids: ``[R, N * D]``, R a multiple of B.

        Returns:
            ``[R, N * D, K]``; entry n is what ``ids[:, n]`` is drawn from.

        Raises:
            ValueError: R is not a multiple of B.
        """

    @abstractmethod
    def sample_image(
        self,
        inputs: VLMInputs,
        seeds: Sequence[int],
        scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> ImageSamples:
        """Generate the tokens of R images; an image depends on its prompt and its seed alone.

        Args:
            inputs: B prompts.
            seeds: R of them, R a multiple of B; each gives its row one uniform number per code.
            scale: of guidance; 1 runs no unconditional row.
            temperature: divides the guided logits; 0 takes the likeliest token.
            top_k: only that many of the likeliest codes are drawn; None is all of them.

        Raises:
            ValueError: R is not a multiple of B, or a number is out of its range.
        """

    def image_log_probs(self, inputs: VLMInputs, ids: Tensor, scale: float = 1.0, temperature: float = 1.0) -> Tensor:
        """Log-probability of each code, differentiable, ``[R, N * D]``.

        Where ``scale`` is not 1 it is that of the guided distribution, and a gradient reaches both rows.

        Args:
            inputs: B prompts.
            ids: ``[R, N * D]``, R a multiple of B.
            scale, temperature: those the tokens were drawn with.
        """
        if scale == 1:
            logits = self.image_logits(inputs, ids).float()
        else:
            both = self.image_logits(join_rows(inputs, self.unconditional(inputs)), torch.cat([ids, ids])).float()
            conditional, unconditional = both.chunk(2)
            logits = guided(conditional, unconditional, scale)
        log_probs = (logits / temperature).log_softmax(-1)
        return log_probs.gather(-1, ids[..., None]).squeeze(-1)
