"""Generation of answers token by token, and log-probabilities of given answers; the same for every backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.by_shape import numbers
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.templates import IGNORE
from umm_zoo.errors import UserError

#: Asked after every token: of the tokens ``[R]``, the rows whose answers they belong to, and the rows that would go on
#: (``[R]`` bool each), it makes the rows that do go on.
Watch = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Samples:
    """Groups of sampled answers: R = B * G rows, the G answers to one prompt next to each other.

    Shape:
        - tokens: ``[R, T]``, padding after the end.
        - mask: ``[R, T]`` bool, True on the answer's tokens, its end-of-turn token included (absent if the length ran out).
        - texts: R decoded answers without special tokens.
        - log_probs: ``[R, T]``, of each token under the distribution it was sampled from (at temperature 0: under the model at
          temperature 1); 0 on padding. No gradient.
    """

    tokens: Tensor
    mask: Tensor
    texts: list[str]
    log_probs: Tensor


def decode(
    step: Callable[[Tensor], Tensor],
    logits: Tensor,
    stop_ids: list[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    top_p: float = 1.0,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample up to ``max_new_tokens`` tokens for each row; a row stops at its first stop token, the loop when every row has.

    Args:
        step: takes the tokens just sampled ``[R]`` and gives the next logits ``[R, vocabulary]``; holds the KV cache.
        logits: ``[R, vocabulary]`` for the first token.
        stop_ids: tokens that end a row.
        pad_id: fills a row after its end.
        max_new_tokens: upper bound T.
        temperature: 0 takes the most likely token.
        generator: source of randomness, on the device of ``logits``; or one of each row, which then draws as it does alone.
        top_p: share of the probability that the likeliest tokens must reach together; the others are not drawn (nucleus sampling,
            arXiv 1904.09751).
        watch: may end rows early.

    Returns:
        (tokens ``[R, T]``, mask ``[R, T]``, log_probs ``[R, T]``), as in ``Samples``.

    Raises:
        ValueError: ``temperature`` is negative or ``max_new_tokens`` is not positive.
        UserError: the network's logits are no numbers.
    """
    if not temperature >= 0 or max_new_tokens < 1:
        raise ValueError(f"found temperature {temperature} and max_new_tokens {max_new_tokens}, expected 0 or more and 1 or more")
    stops = send(torch.tensor(stop_ids), logits.device)
    running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    tokens, masks, scores = [], [], []
    while True:
        log_probs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [R, vocabulary]
        if log_probs.isnan().any():  # of which the likeliest would be a token like any other, and a draw ends in the library
            hint = "the learning rate of their training, or half precision, may be too much for them"
            raise UserError("weights", "a next token whose probability is nan", "finite weights and activations", hint)
        if temperature == 0:
            drawn = log_probs.argmax(-1)
        else:
            log_probs = log_probs if top_p >= 1 else nucleus(log_probs, top_p)
            drawn = _draw(log_probs.exp(), generator)
        scores.append(log_probs.gather(1, drawn[:, None]).squeeze(1).where(running, 0.0))
        tokens.append(drawn.where(running, pad_id))
        masks.append(running)
        running = running & ~torch.isin(drawn, stops)
        if watch is not None:
            running = running & watch(tokens[-1], masks[-1], running)
        if len(tokens) == max_new_tokens or not running.any():
            return torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(scores, 1)
        logits = step(tokens[-1])


def nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """Log-probabilities ``[R, vocabulary]`` of the likeliest tokens alone, the fewest that reach ``top_p`` together."""
    ordered, places = log_probs.sort(-1, descending=True)
    probs = ordered.exp()
    spare = probs.cumsum(-1) - probs >= top_p  # those before it reach it already; never the first
    spare[:, 0] = False
    return log_probs.masked_fill(spare.scatter(1, places, spare), -torch.inf).log_softmax(-1)


def _draw(probs: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """A token of each row, ``[R]``."""
    if isinstance(generator, Sequence):
        rows = zip(probs.split(1), generator, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=own)[:, 0] for row, own in rows])
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def label_log_probs(
    hidden: Tensor, labels: Tensor, lm_head: Callable[[Tensor], Tensor], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of every labelled token, differentiable, with logits formed only where there is a label.

    Args:
        hidden: ``[B, L, D]`` states that enter ``lm_head``.
        labels: ``[B, L]``, unshifted: the state at position i predicts the label at i + 1.
        lm_head: maps ``[K, D]`` to ``[K, vocabulary]``.
        temperature: divides the logits, as sampling did.

    Returns:
        (log_probs ``[B, L-1]``, 0 where there is no label; mask ``[B, L-1]``).
    """
    targets = labels[:, 1:]
    mask = targets != IGNORE
    return token_log_probs(hidden[:, :-1], targets, mask, lm_head, temperature), mask


def token_log_probs(
    states: Tensor, tokens: Tensor, mask: Tensor, lm_head: Callable[[Tensor], Tensor], temperature: float = 1.0
) -> Tensor:
    """Log-probability of each token from the state that predicts it, ``[B, L]``, 0 outside the mask; differentiable.

    Args:
        states: ``[B, L, D]`` that enter ``lm_head``.
        tokens, mask: ``[B, L]``; logits are formed only where the mask is True.
        lm_head, temperature: as in ``label_log_probs``.
    """
    logits = lm_head(states[mask]).float() / temperature  # [K, vocabulary]
    chosen = logits.gather(1, tokens[mask][:, None]).squeeze(1) - logits.logsumexp(-1)
    return chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)


def last_position(position_ids: Tensor) -> Tensor:
    """Largest position id of each row, ``[B]``, of ``[B, L]`` or ``[3, B, L]``.

    Padding has position 0, so it is always a real token's; it is not the last column's where a prompt ends in an image.
    """
    last = position_ids.amax(-1)
    return last if last.ndim == 1 else last.amax(0)


#: Of all rows together: what has other rows knows them no more.
_OF_WHOLE = ("padded", "image_places", "label_places", "packed")


def _tensors(inputs: VLMInputs) -> dict[str, Tensor]:
    values = {item.name: getattr(inputs, item.name) for item in fields(inputs) if item.name not in _OF_WHOLE}
    return {name: value for name, value in values.items() if value is not None}


def take_rows(inputs: VLMInputs, rows: Tensor) -> VLMInputs:
    """The rows of these numbers; the images are not encoded again."""
    taken = {name: value[rows] for name, value in _tensors(inputs).items() if name != "position_ids"}
    places = inputs.position_ids[..., rows, :]  # [B, L], or [3, B, L] for M-RoPE
    return VLMInputs(**taken, position_ids=places, padded=inputs.padded)


def choose_rows(chosen: Tensor, one: VLMInputs, other: VLMInputs) -> VLMInputs:
    """The rows of one where ``chosen`` ``[B]`` bool says so, else those of the other, of the same length."""
    axes, others = {"embeddings": chosen[:, None, None]}, _tensors(other)  # all others end in [B, L]
    rows = {name: torch.where(axes.get(name, chosen[:, None]), own, others[name]) for name, own in _tensors(one).items()}
    return VLMInputs(**rows, padded=one.padded or other.padded)


def join_rows(one: VLMInputs, other: VLMInputs) -> VLMInputs:
    """The rows of one, then those of the other, of the same length."""
    others, axes = _tensors(other), {"position_ids": -2}  # [B, L], or [3, B, L] for M-RoPE
    rows = {name: torch.cat([own, others[name]], axes.get(name, 0)) for name, own in _tensors(one).items()}
    return VLMInputs(**rows, padded=one.padded or other.padded)


def append_answers(inputs: VLMInputs, tokens: Tensor, mask: Tensor, embeddings: Tensor) -> VLMInputs:
    """Left-padded prompts with answers behind them, as their only labels: the very tokens that were sampled.

    A text that is decoded and tokenised again need not give the tokens back, and then its log-probabilities are of something else.

    Args:
        inputs: B prompts embedded ``for_generation``; each is repeated for its R / B answers.
        tokens, mask: ``[R, T]`` as in ``Samples``.
        embeddings: ``[R, T, D]`` of the tokens.

    Raises:
        ValueError: R is not a multiple of B.
    """
    group, rest = divmod(len(tokens), len(inputs.token_ids))
    if rest or not group:
        raise ValueError(f"append_answers: found {len(tokens)} answers, expected a multiple of {len(inputs.token_ids)} prompts")
    inputs = take_rows(inputs, numbers(torch.device("cpu"), len(inputs.token_ids)).repeat_interleave(group))
    steps = numbers(tokens.device, tokens.shape[1]) + 1
    places = (last_position(inputs.position_ids)[:, None] + steps).expand(*inputs.position_ids.shape[:-1], -1)
    return VLMInputs(
        token_ids=torch.cat([inputs.token_ids, tokens], 1),
        embeddings=torch.cat([inputs.embeddings, embeddings.to(inputs.embeddings.dtype)], 1),
        attention_mask=torch.cat([inputs.attention_mask, mask], 1),
        position_ids=torch.cat([inputs.position_ids, places], -1),
        labels=torch.cat([torch.full_like(inputs.labels, IGNORE), tokens.masked_fill(~mask, IGNORE)], 1),
        image_mask=torch.cat([inputs.image_mask, torch.zeros_like(mask)], 1),
        deepstack=None if inputs.deepstack is None else F.pad(inputs.deepstack, (0, 0, 0, 0, 0, tokens.shape[1])),
    )
