"""Vision-language backbone: the interface that methods use, whatever library stands behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.precision import ExactBuffers
from umm_zoo.backbones.preparation import Asked, Preparation
from umm_zoo.backbones.templates import IGNORE, ChatTemplate
from umm_zoo.batch import Batch, Conversation, Grid, Images
from umm_zoo.blocks.fusion import TokenFusion
from umm_zoo.errors import UserError
from umm_zoo.outputs import TokenCount, sequence_counts


@dataclass
class VLMInputs:
    """A tokenised, embedded batch, ready for the language model.

    Shape:
        - token_ids, labels: ``[B, L]`` long; a label is the token itself where it is trained, ``IGNORE`` elsewhere (unshifted).
        - embeddings: ``[B, L, D]``, text embeddings with the image tokens already in place.
        - attention_mask: ``[B, L]`` bool, False on padding.
        - position_ids: ``[B, L]``, or ``[3, B, L]`` for M-RoPE.
        - image_mask: ``[B, L]`` bool, True at image tokens (raster order, image after image).
        - deepstack: ``[B, L, K, D]``, what is added to the states behind each of the first K layers (DeepStack, arXiv 2406.04334),
          0 at text; None where nothing is.
        - image_places, label_places: ``[image tokens]``, ``[K]``, numbers in ``[B * L]`` of the image tokens, and of what stands
          before a label; None where only the device knows, and whoever asks has to wait for it.

    Attributes:
        padded: whether rows may hold padding; False only where their lengths are known to be equal.
        packed: how rows are packed where they are (``PackedRows``).
    """

    token_ids: Tensor
    embeddings: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    image_mask: Tensor
    padded: bool = True
    deepstack: Tensor | None = None
    image_places: Tensor | None = None
    label_places: Tensor | None = None
    packed: Any = None

    @property
    def mask(self) -> Tensor | None:
        """The attention mask; None where nothing is padded, so that attention takes its fast causal kernels."""
        return self.attention_mask if self.padded else None

    @property
    def token_counts(self) -> dict[str, TokenCount]:
        """Tokens of the sequences, ``text`` and ``image``; of packed ones no padding is computed."""
        counts = sequence_counts(self.attention_mask, self.image_mask)
        return counts if self.packed is None else {kind: TokenCount(own.useful, own.useful) for kind, own in counts.items()}


@dataclass
class VLMOutput:
    """Losses and states of a forward pass.

    Shape:
        - loss: ``[]``, mean next-token cross-entropy in nats over all labelled tokens of the batch (0 without any).
        - nll, num_tokens: ``[B]``, its sum and count per row.
        - hidden: ``[B, L, D]``, last hidden states after the final norm, exactly what enters ``lm_head``.
    """

    loss: Tensor
    nll: Tensor
    num_tokens: Tensor
    hidden: Tensor


class VLMBackbone(ExactBuffers, ABC):
    """A vision-language model. Subclasses are the only files that know their library's attribute paths.

    Attributes:
        width: language-model width D.
        image_size: side of the square images the vision tower takes, in pixels; None where any size will do.
        template: form of the conversations.
    """

    width: int
    image_size: int | None
    template: ChatTemplate

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The named parts a stage may train or freeze; together they hold every parameter exactly once."""

    @abstractmethod
    def image_grid(self, height: int, width: int) -> Grid:
        """Grid of tokens that an image of that many pixels becomes."""

    def forms_grid(self, height: int, width: int) -> bool:
        """Whether the tokens of an image of that many pixels are a grid over it, without tiles and other tokens between."""
        return True

    @abstractmethod
    def embed(
        self,
        conversations: list[Conversation],
        images: Images | None,
        image_counts: list[int],
        for_generation: bool = False,
        opening: str = "",
    ) -> VLMInputs:
        """Tokenise with the chat template, encode the images once, put both together.

        Args:
            conversations: B lists of turns.
            images: M of ``[3, H, W]`` in [-1, 1], or None; of any sizes that the vision tower takes.
            image_counts: images per row.
            for_generation: pad on the left and end with the opening of an assistant turn.
            opening: first words of that turn, tokenised with what stands before them.

        Raises:
            UserError: the number of ``<image>`` markers of a row is not its number of images.
        """

    @abstractmethod
    def forward(self, inputs: VLMInputs) -> VLMOutput:
        """Run the language model over the whole sequence."""

    @abstractmethod
    def generate(
        self,
        conversations: list[Conversation],
        images: Images | None,
        image_counts: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """Answer B prompts (conversations that end with a user turn) with the KV cache; temperature 0 is greedy."""

    def pack_rows(self) -> None:
        """Pack the rows of training batches from now on: no padding is computed, each row attends to itself alone.

        Raises:
            UserError: the language model could not keep them apart.
        """
        raise UserError("method.packing", f"a {type(self).__name__}, which packs no rows", "packing: false")

    def fuse(self, codec: LatentCodec, fusion: TokenFusion) -> None:
        """Let a fusion with a codec's latents of the same images stand in the projector's place; before anything is trained.

        Raises:
            UserError: this model fuses nothing, or grids or widths do not fit.
        """
        raise UserError("method.fusion", f"a fusion for a {type(self).__name__}, which takes none", "a LlavaBackbone")

    def count_labels(self, batch: Batch) -> int:
        """Tokens of a batch that the language loss is a mean over."""
        with torch.no_grad():
            return int((self.inputs_of(batch).labels[:, 1:] != IGNORE).sum())

    def check_rows(self, batch: Batch, for_generation: bool = False, opening: str = "") -> None:
        """Nothing, where ``embed`` takes every row of a batch, or for generation every prompt; no network runs.

        Raises:
            UserError: ``embed`` refuses its ``row``.
        """

    def check_conversations(self, batch: Batch, answers: bool) -> None:
        """``check_rows`` of whole rows, and of their prompts where ``answers`` to them are generated."""
        self.check_rows(batch)
        if answers:
            self.check_rows(batch, for_generation=True)

    def preparation(self, asked: Callable[[Batch], Iterable[Asked]]) -> Preparation | None:
        """What can be prepared, ahead of its steps, of a batch that will be ``asked`` for these rows; None for nothing."""
        return None

    def inputs_of(self, batch: Batch) -> VLMInputs:
        """``embed`` of a batch's own conversations and images, for training."""
        return self.embed(batch.conversations, batch.images, batch.image_counts)


def places_of(mask: Tensor) -> Tensor:
    """Numbers in ``[B * L]`` of the places of a mask ``[B, L]`` where it is True; of a mask on a device one waits for it."""
    return mask.flatten().nonzero()[:, 0]


def put(values: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """``[B, L, ...]`` with other rows ``[n, ...]`` at places ``[n]``, see ``places_of``; differentiable."""
    return values.flatten(0, 1).index_copy(0, places, rows.to(values.dtype)).view(values.shape)


def at(values: Tensor, mask: Tensor, places: Tensor | None) -> Tensor:
    """Rows ``[n, ...]`` of ``[B, L, ...]`` where a mask ``[B, L]`` is True; with its ``places`` nothing waits for the device."""
    return values.flatten(0, 1).index_select(0, places_of(mask) if places is None else places)


def before_labels(labels: Tensor) -> Tensor:
    """Mask ``[B, L]`` of the places whose states predict a label: of ``[B, L]``, unshifted, the places before them."""
    return F.pad(labels[:, 1:] != IGNORE, (0, 1))


def language_loss(
    hidden: Tensor, labels: Tensor, lm_head: Callable[[Tensor], Tensor], places: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Next-token cross-entropy with logits formed only where there is a label.

    A vocabulary row per position is the largest tensor of a small model; most positions (prompt, image) have no label.

    Args:
        hidden: ``[B, L, D]`` states that enter ``lm_head``.
        labels: ``[B, L]``, unshifted: the state at position i predicts the label at i + 1.
        lm_head: maps ``[K, D]`` to ``[K, vocabulary]``.
        places: ``VLMInputs.label_places``.

    Returns:
        (loss ``[]``, nll ``[B]``, num_tokens ``[B]``), the loss being ``nll.sum() / num_tokens.sum()``.
    """
    before = before_labels(labels)
    places = places_of(before) if places is None else places
    logits = lm_head(at(hidden, before, places))  # [K, vocabulary]
    losses = F.cross_entropy(logits.float(), labels.flatten().index_select(0, places + 1), reduction="none")  # [K]
    nll = losses.new_zeros(len(labels)).index_add(0, places // labels.shape[1], losses)
    num_tokens = before.sum(dim=1)
    return nll.sum() / num_tokens.sum().clamp(min=1), nll, num_tokens
