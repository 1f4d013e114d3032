"""Hidden tokens of images: their states under prompts, their losses, and their generation in rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.harmon import EncodedPrompts, HarmonBackbone
from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.denoisers import Denoiser, RegressionHead
from umm_zoo.blocks.masked_autoencoder import MaskedDecoder
from umm_zoo.blocks.masking import Unmasking
from umm_zoo.objectives.base import Objective
from umm_zoo.objectives.rounds import fill_in


class HiddenTokens:
    """What encoder, language model, decoder and head make of image tokens of which some are hidden.

    Shape:
        tokens ``[B, N, C]`` of a grid of N cells, masks ``[B, N]`` bool on the CPU, True where they are hidden

    Args:
        vlm, decoder, head, objective, unmasking: of the method, which owns them.
    """

    def __init__(
        self,
        vlm: HarmonBackbone,
        decoder: MaskedDecoder,
        head: Denoiser | RegressionHead,
        objective: Objective,
        unmasking: Unmasking,
    ) -> None:
        self.vlm, self.decoder, self.head, self.objective, self.unmasking = vlm, decoder, head, objective, unmasking

    def states(self, tokens: Tensor, hidden: Tensor, grid: Grid, prompts: VLMInputs | EncodedPrompts) -> Tensor:
        """The decoder's states of all tokens, ``[B, N, E]``."""
        encoded, read = self.vlm.instruct(self.vlm.encoder(tokens, hidden, grid), prompts)
        return self.decoder(encoded, read if self.decoder.prompt_dim else None)

    def losses(self, tokens: Tensor, hidden: Tensor, grid: Grid, prompts: VLMInputs, generator: torch.Generator | None) -> Tensor:
        """Of each row, the mean over its hidden tokens and over draws, ``[B]``; noise is as the seed of a generator says."""
        states = self.states(tokens, hidden, grid, prompts)
        rows, places = (send(own, tokens.device) for own in hidden.nonzero(as_tuple=True))
        wanted, condition = tokens[rows, places], states[rows, places]  # [M, C], [M, E]
        noise = None if generator is None else torch.Generator(tokens.device).manual_seed(generator.initial_seed())
        losses = self.objective.losses(self.head, wanted[..., None, None], Tokens(condition[:, None]), noise).mean(dim=0)
        return losses.new_zeros(len(tokens)).index_add(0, rows, losses) / send(hidden.sum(1), tokens.device)

    @torch.no_grad()
    def fill_in(
        self,
        tokens: Tensor,
        hidden: Tensor,
        grid: Grid,
        texts: Sequence[str],
        empty: str,
        generators: Sequence[torch.Generator],
        scale: float,
    ) -> Tensor:
        """Tokens with those generated that are hidden; a prompt is encoded once, however many rows and rounds.

        Args:
            tokens, hidden, grid: see the class.
            texts: prompts of the rows.
            empty: the one that says nothing, beside which guidance puts them.
            generators: one of each row.
            scale: of guidance; 1 is none.
        """
        branches = [*texts, *([empty] * len(texts) if scale != 1 else [])]
        different = list(dict.fromkeys(branches))
        rows = torch.tensor([different.index(text) for text in branches])
        prompts = self.vlm.encode_prompts(self.vlm.prompts(different), send(rows, tokens.device))
        times = len(branches) // len(texts)

        def states(known: Tensor, places: Tensor) -> Tensor:
            return self.states(known.repeat(times, 1, 1), places.repeat(times, 1), grid, prompts)

        return fill_in(states, self.head, self.objective, self.unmasking, tokens, hidden, generators, scale)
