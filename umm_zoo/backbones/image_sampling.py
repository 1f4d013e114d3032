"""Sampling of image tokens: random numbers of one row each, and one step after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.unified import guided
from umm_zoo.blocks.code_heads import CodeHead

#: Place of a token among those to come: a number, or a tensor ``[1]`` that a CUDA graph reads again in every replay.
Step = int | Tensor


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Numbers in [0, 1) of each row's own generator, ``[R, length]`` in float64 on the CPU."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse of the distribution function.

    Args:
        logits: ``[R, K]``.
        uniform: ``[R]`` in [0, 1).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only that many of the likeliest tokens are drawn; None is all of them.

    Returns:
        (ids ``[R]``, the probability ``[R]`` of each; at temperature 0 that of temperature 1).
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    chances = logits.softmax(-1)
    if temperature == 0:
        ids = chances.argmax(-1, keepdim=True)
    else:
        cumulative = chances.cumsum(-1, dtype=torch.float64)
        ids = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return ids[:, 0], chances.gather(1, ids)[:, 0]


def draw_token(
    head: nn.Module, hidden: Tensor, chances: Tensor, scale: float = 1.0, temperature: float = 1.0, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """The D codes of one image token per row, one after the other.

    Args:
        head: the library's for one code, or a ``CodeHead``.
        hidden: states ``[R, W]``; where ``scale`` is not 1 ``[2 R, W]``, those of the prompts that say nothing behind the others.
        chances: ``[R, D]`` in [0, 1).
        scale, temperature, top_k: of guidance, and see ``draw``.

    Returns:
        (codes ``[R, D]``, the probability ``[R, D]`` of each).
    """
    codes, probs = chances.new_empty(len(chances), 0, dtype=torch.long), []
    for chance in chances.unbind(1):
        known = torch.cat([codes, codes]) if scale != 1 else codes
        logits = (head.next(hidden, known) if isinstance(head, CodeHead) else head(hidden)).float()
        if scale != 1:
            conditional, unconditional = logits.chunk(2)
            logits = guided(conditional, unconditional, scale)
        drawn, likely = draw(logits, chance, temperature, top_k)
        codes = torch.cat([codes, drawn[:, None]], dim=1)
        probs.append(likely)
    return codes, torch.stack(probs, dim=1)


def distinct(inputs: VLMInputs) -> tuple[Tensor, Tensor]:
    """Numbers of prompts of text that differ, ``[U]``, and for each prompt its place among them, ``[B]``.

    Captions of a group are often the same, and prompts that say nothing are where they are of one length.
    """
    _, places = inputs.token_ids.where(inputs.attention_mask, -1).unique(dim=0, return_inverse=True)
    numbers = torch.arange(len(places), device=places.device)
    return torch.empty_like(numbers[: int(places.max()) + 1]).scatter_(0, places, numbers), places


def take(table: Tensor, step: Step) -> Tensor:
    """The column ``[R, …]`` of that step in ``[R, N, …]``."""
    return table[:, step] if isinstance(step, int) else table.index_select(1, step).squeeze(1)


def put(table: Tensor, column: Tensor, step: Step, dim: int = 1) -> None:
    """Write a column into ``table``, in place."""
    if isinstance(step, int):
        table.select(dim, step).copy_(column)
    else:
        table.index_copy_(dim, step, column.unsqueeze(dim))


def in_turn(advance: Callable[[Step], None], length: int, device: torch.device, start_over: Callable[[], object]) -> None:
    """Call ``advance`` for every step; on a CUDA device its kernels are recorded once and replayed.

    The recording has not been run on a GPU by us; where it fails the steps are taken one by one, and a warning says so.

    Args:
        advance: changes tensors in place, none of which moves.
        length: number of steps.
        device: of the tensors.
        start_over: undoes what ``advance`` has changed.
    """
    if device.type == "cuda":
        try:
            step = torch.zeros(1, dtype=torch.long, device=device)
            graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):  # libraries allocate their workspaces in the first call
                advance(step)
            torch.cuda.current_stream(device).wait_stream(aside)
            with torch.cuda.graph(graph):
                advance(step)
                step.add_(1)
            start_over()
            step.zero_()
            for _ in range(length):
                graph.replay()
            return
        except RuntimeError as error:
            warnings.warn(f"image tokens are sampled without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=2)
            start_over()
    for number in range(length):
        advance(number)
