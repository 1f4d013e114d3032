"""Janus's parts as a model of hidden image tokens: full attention inside an image, and a token that stands for a hidden one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.by_shape import numbers
from umm_zoo.backbones.generation import append_answers
from umm_zoo.backbones.janus import Janus
from umm_zoo.backbones.prefix import Prefix, evaluation_mode
from umm_zoo.backbones.unified import ImageSamples
from umm_zoo.blocks.code_heads import CodeHead
from umm_zoo.errors import UserError


class MaskedJanus(Janus):
    """Janus whose image tokens see each other and the prompt, and of which some are hidden: Show-o's form of image generation.

    Text is causal and an image full, as in Show-o (Xie et al., arXiv 2408.12528), but with Janus's parts: a second encoder for
    reading, embeddings and a head of image tokens apart. The embeddings have one more row, that of a hidden token, which begins as
    the mean of the others. ``objectives.tokens.MaskedTokens`` trains and samples it.

    Args:
        model, codec, tokenizer, template, unconditional, max_length, gradient_checkpointing, source, head: see ``Janus``.

    Raises:
        UserError: a head over several codes of a token.
    """

    def grow_image_tokens(self) -> None:
        """A row of the embeddings for a hidden token."""
        if isinstance(self.image_head, CodeHead):
            found = f"a {type(self.image_head).__name__} in a MaskedJanus"
            raise UserError("head", found, "none: its tokens are one code each")
        table = cast(nn.Embedding, self.image_embeddings)
        rows = table.weight.detach()
        table.weight = nn.Parameter(torch.cat([rows, rows.mean(dim=0, keepdim=True)]))
        table.num_embeddings = len(table.weight)

    def masked_logits(self, inputs: VLMInputs, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits of every image token given the prompt and those that are not hidden, differentiable.

        Args:
            inputs: B prompts.
            ids: ``[R, N]``, R a multiple of B.
            hidden: ``[R, N]`` bool.

        Returns:
            ``[R, N, K]``.
        """
        length, shown = inputs.token_ids.shape[1], self._shown(ids, hidden)
        whole = append_answers(inputs, ids, torch.ones_like(hidden), shown)
        mask = inside_full(whole.attention_mask, length)
        states = self.run(whole.embeddings, mask, whole.position_ids)
        return cast(Tensor, self.image_head(states[:, length:]))

    @torch.no_grad()
    def logits_behind(self, prefix: Prefix, ids: Tensor, hidden: Tensor) -> Tensor:
        """``masked_logits`` behind prompts that are encoded already, which stay as they are; evaluation mode."""
        every = torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool, device=ids.device)
        places = prefix.text_positions(ids.shape[1])[0]
        with evaluation_mode(self):
            states = self.run(self._shown(ids, hidden), prefix.mask_with(every), places, prefix.copy().cache)
            return cast(Tensor, self.image_head(states))

    def _shown(self, ids: Tensor, hidden: Tensor) -> Tensor:
        return self.embed_image(ids.masked_fill(hidden, self.codec.num_codes))

    def image_logits(self, inputs: VLMInputs, ids: Tensor) -> Tensor:
        """Not of this model.

        Raises:
            UserError: always.
        """
        raise self._refused("image_logits")

    def sample_image(
        self,
        inputs: VLMInputs,
        seeds: Sequence[int],
        scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> ImageSamples:
        """Not of this model.

        Raises:
            UserError: always.
        """
        raise self._refused("sample_image")

    def save(self, folder: str | Path) -> None:
        """Not of this model: the library has no format for it.

        Raises:
            UserError: always.
        """
        raise self._refused("save")

    def _refused(self, what: str) -> Any:
        return UserError("method", f"{what} of a MaskedJanus, whose image tokens come in rounds", "a Janus, or MaskedTokens")


def inside_full(mask: Tensor, length: int) -> Tensor:
    """Attention of prompts of ``length`` tokens, causal, and of what follows, to the prompt and all of itself.

    Args:
        mask: ``[R, L]`` bool, False on padding.

    Returns:
        ``[R, 1, L, L]`` bool; padding attends to itself, so that nothing is without a key.
    """
    places = numbers(mask.device, mask.shape[1])
    causal = places[None] <= places[:, None]
    full = (places[:, None] >= length) & (places[None] >= length)
    own = F.one_hot(places, len(places)).bool()
    return ((causal | full) & mask[:, None] | own)[:, None]
