"""Generation of continuous image tokens in rounds: which places, from what states, and noise of each row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from umm_zoo.backbones.devices import send
from umm_zoo.batch import Tokens
from umm_zoo.blocks.masking import RandomOrder, Unmasking, kept_places
from umm_zoo.objectives.base import Objective, Predictor
from umm_zoo.objectives.guidance import GuidedRows


def fill_in(
    states: Callable[[Tensor, Tensor], Tensor],
    head: Predictor,
    objective: Objective,
    unmasking: Unmasking,
    tokens: Tensor,
    hidden: Tensor,
    generators: Sequence[torch.Generator],
    scale: float = 1.0,
) -> Tensor:
    """Tokens with those generated that are hidden, each round's from the states that the tokens known so far give.

    Within a round tokens are drawn independently of each other, in a random order (MAR, arXiv 2406.11838, section 3.4). Both
    branches of guidance have the same tokens, order and noise.

    Args:
        states: of tokens ``[R, N, C]`` and hidden places ``[R, N]``: ``[R, N, E]``, or ``[2R, N, E]`` with those of the
            unconditional branch behind.
        head, objective: of a token alone.
        unmasking: rounds; of as many as there are hidden tokens where those are fewer than all and than its rounds.
        tokens: ``[R, N, C]``.
        hidden: ``[R, N]`` bool on the CPU, as many in each row.
        generators: one of each row, on the CPU.
        scale: of guidance.

    Raises:
        UserError: more rounds than tokens.
    """
    count = int(hidden[0].sum())
    counts = unmasking.counts(count, min(count, unmasking.num_rounds) if count < hidden.shape[1] else None)
    for now, strength in zip(counts, unmasking.scales(scale, counts), strict=True):
        scores = RandomOrder().scores(0, len(counts), uniform_rows(generators, tokens.shape[1]))
        chosen = kept_places(scores, hidden, now)
        places = send(chosen, tokens.device).nonzero(as_tuple=True)
        found, *other = states(tokens, hidden).split(len(tokens))
        network = GuidedRows(head, other[0][places][:, None], strength, tokens.shape[-1]) if other else head
        shape = (objective.num_noises, now, tokens.shape[-1], 1, 1)
        noise = torch.cat([torch.randn(shape, generator=own) for own in generators], dim=1)
        made = objective.sample_from(network, send(noise, tokens.device), Tokens(found[places][:, None]))
        tokens = tokens.index_put(places, made.flatten(1).to(tokens.dtype))
        hidden = hidden & ~chosen
    return tokens


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator of each row, on the CPU."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniform_rows(generators: Sequence[torch.Generator], length: int) -> Tensor:
    """Numbers in [0, 1) of each row's own generator, ``[R, length]``."""
    return torch.stack([torch.rand(length, generator=own) for own in generators])
