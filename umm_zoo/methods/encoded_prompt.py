"""Encoded prompts: the states of a frozen model after a batch of requests, as data that queries go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from umm_zoo.backbones.base import VLMInputs, places_of, put
from umm_zoo.backbones.by_shape import by_shape
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.prefix import Prefix, PrefixBackbone
from umm_zoo.batch import Batch, Grid, Tokens, map_by_size
from umm_zoo.blocks.details import DetailBranch, Details, row_numbers
from umm_zoo.blocks.pathways import QueryPathway
from umm_zoo.errors import UserError
from umm_zoo.methods.source_latents import aligned_latents, latents_of_sources
from umm_zoo.objectives.step import blocks_are_sharded
from umm_zoo.outputs import QueryAttention


@dataclass
class EncodedPrompt:
    """Cached prompts of a batch, and the detail tokens of their images.

    Shape:
        - context: ``[B, L, D]``, the prompt's embeddings
        - prefix: its keys and values
        - image_mask: ``[B, L]`` bool, True at the vision tower's tokens
        - details: K tokens per row, 0 without a detail branch
    """

    context: Tokens
    prefix: Prefix
    image_mask: Tensor
    details: Details

    def select(self, rows: Sequence[int]) -> EncodedPrompt:
        """Some rows, in the given order."""
        if list(rows) == list(range(len(self.image_mask))):
            return self
        chosen = row_numbers(rows, self.image_mask.device)
        return EncodedPrompt(
            self.context.select(rows), self.prefix.select(chosen), self.image_mask[chosen], self.details.select(rows)
        )


def encode_prompt(
    vlm: PrefixBackbone,
    codec: LatentCodec,
    detail: DetailBranch | None,
    batch: Batch,
    opening: str = "",
    known: Mapping[int, Tensor] | None = None,
) -> EncodedPrompt:
    """Encode the prompts of a batch up to the opening of an answer; only detail tokens carry a gradient.

    The prompt ends with the opening of an assistant turn and the queries' ``opening``: MetaQuery's have one; that WeMMU's have none
    is our choice. Latents of input images that are ``known``, by the ``id`` of the image, are not computed again.
    """
    latents = _latents(vlm, codec, detail, batch, known or {})  # before the model: the codec may have been at work for the targets
    with torch.no_grad():
        inputs = vlm.embed(batch.prompts(), batch.images, batch.image_counts, for_generation=True, opening=opening)
        prefix = vlm.keys(inputs)
    context = Tokens(inputs.embeddings, inputs.mask)
    return EncodedPrompt(context, prefix, inputs.image_mask, encode_details(detail, batch, inputs, latents))


def _latents(
    vlm: PrefixBackbone, codec: LatentCodec, detail: DetailBranch | None, batch: Batch, known: Mapping[int, Tensor]
) -> list[Tensor]:
    """Latents of the input images where a branch asks for them; without images one of a blank, or of nothing, for its gradients."""
    if detail is None:
        return []
    device = next(detail.parameters()).device
    if not batch.images and blocks_are_sharded():  # the codec's blocks are called by every rank
        return aligned_latents(vlm, codec, [torch.zeros(3, 64, 64, device=device)])
    if not batch.images:
        return [torch.zeros(detail.latent_channels, 1, 1, device=device)]
    for image in batch.images:
        assert_grid(vlm, detail, image)
    return latents_of_sources(vlm, codec, [image.to(device) for image in batch.images], known)


def encode_details(detail: DetailBranch | None, batch: Batch, inputs: VLMInputs, latents: list[Tensor]) -> Details:
    """Tokens of the input images' own latents, at the places of the vision tower's tokens."""
    width, device = inputs.embeddings.shape[-1], inputs.embeddings.device
    if detail is None:
        return Details.none(inputs.embeddings)
    if not batch.images:
        (blank,) = map_by_size(detail, latents)
        return Details.none(inputs.embeddings, 0 * blank.sum())
    tokens = map_by_size(detail, latents)  # [n, D] of each image, n by its own grid
    lengths, left = [], iter(len(own) for own in tokens)
    for count in batch.image_counts:
        lengths.append(list(islice(left, count)))
    numbers, slots = _owners(device, tuple(map(tuple, lengths)))
    details = put(tokens[0].new_zeros(*numbers.shape, width), slots, torch.cat(tokens))
    seen = places_of(inputs.image_mask) if inputs.image_places is None else inputs.image_places
    places = inputs.position_ids.expand(3, *inputs.image_mask.shape)  # the running index three times, where there is no M-RoPE
    ids = places.flatten(1).index_select(1, seen)  # [3, tokens]; images of a row follow each other in the prompt too
    positions = ids.new_zeros(3, numbers.numel()).index_copy(1, slots, ids).view(3, *numbers.shape)
    return Details(details, positions, numbers, lengths=list(map(sum, lengths)))


@by_shape
def _owners(lengths: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """Which image of its row each detail token is of, ``[B, K]``, -1 on padding; and the places ``[tokens]`` in that of all."""
    owners = [[place for place, length in enumerate(own) for _ in range(length)] for own in lengths]
    most = max(map(len, owners))
    numbers = torch.tensor([own + [-1] * (most - len(own)) for own in owners])
    return numbers, places_of(numbers >= 0)


def assert_grid(vlm: PrefixBackbone, detail: DetailBranch | None, image: Tensor) -> None:
    """Refuse detail tokens for an image whose tokens in the model form no grid to put them on.

    Raises:
        UserError: they form none.
    """
    height, width = image.shape[-2:]
    if detail is not None and not vlm.forms_grid(height, width):
        found = f"a detail branch beside a model that makes an image of {width} x {height} px no grid of tokens, but tiles"
        hint = "detail: null, or settings of method.vlm.image_processor without tiles"
        raise UserError("method.detail", found, "one token per place", hint)


@torch.no_grad()
def query_attention(pathway: QueryPathway, prompt: EncodedPrompt, queries: Tensor, grid: Grid) -> QueryAttention:
    """Attention of the queries to the image over that to the words, after WeMMU's Figure 3 (whose unit is not published).

    Mean attention that a query pays to one token of the vision tower minus that to one token of text, over queries, heads and
    layers. Rows without an image do not count, and the words of the chat template count as text; a positive number is a bias to the
    image, that is to copying.
    """
    words = prompt.prefix.attention_mask & ~prompt.image_mask
    rows = prompt.image_mask.any(dim=1)
    if not rows.any():
        zero = queries.new_zeros((), dtype=torch.float32)
        return QueryAttention(zero, zero, 0)
    raw, logs = [], []
    for weights in pathway.attention(prompt.prefix, prompt.details, queries, grid):
        paid = weights[..., : words.shape[1]].float().mean(dim=2)  # [B, heads, L]
        image, text = (
            (paid * kind[:, None]).sum(-1) / kind.sum(-1, keepdim=True).clamp(min=1) for kind in (prompt.image_mask, words)
        )  # [B, heads]
        raw.append((image - text)[rows].mean())
        logs.append((image.clamp(min=1e-12).log() - text.clamp(min=1e-12).log())[rows].mean())
    return QueryAttention(torch.stack(raw).mean(), torch.stack(logs).mean(), int(rows.sum()))
