"""A frozen model's reading of prompts in words, stored beside the shards and put back in the place of reading them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.prefix import Prefix, PrefixBackbone
from umm_zoo.batch import Batch, Conversation, Turn

#: Name in ``Batch.extras`` of what ``data_pipelines.precompute --only prefix`` stored.
PREFIX = "prefix"
#: Token ids are stored as three digits of this base: whole numbers that every 16-bit float holds exactly (bfloat16 up to 256).
_BASE = 256
_DIGITS = 3


def stored_prefixes(vlm: PrefixBackbone) -> Precomputable:
    """Keys and values of prompts without images, for ``Method.precomputable``; prompts of the same text share one entry.

    Rows with images get an empty entry: theirs would hardly repeat. At 3B a token takes 74 kB (37 with ``--half``), so this is
    stored only when asked for. A shard that several tasks read gets the entries of the first: list the one with words before
    reconstruction and unconditional drawing, whose own prompts are read in training as ever.
    """

    def alone(batch: Batch) -> list[bool]:
        return [count == 0 for count in batch.image_counts]

    def prompts(batch: Batch) -> list[Conversation]:  # as ``branches.Prompts`` shows them
        return [[Turn(role=turn["role"], text=turn["text"].strip()) for turn in prompt] for prompt in batch.prompts()]

    @torch.no_grad()
    def compute(batch: Batch) -> list[Tensor]:
        entries = [torch.zeros(0, stored_width(vlm)) for _ in batch.keys]
        rows = [row for row, is_alone in enumerate(alone(batch)) if is_alone]
        if rows:
            shown = prompts(batch)
            inputs = vlm.embed([shown[row] for row in rows], None, [0] * len(rows), for_generation=True)
            for row, entry in zip(rows, to_store(vlm, inputs, range(len(rows))), strict=True):
                entries[row] = entry
        return entries

    def same(batch: Batch) -> list[str]:
        texts = [json.dumps([[turn["role"], turn["text"]] for turn in prompt]) for prompt in prompts(batch)]
        return [text if is_alone else "" for text, is_alone in zip(texts, alone(batch), strict=True)]

    frame = [
        str(piece) for piece in vlm.template.render([Turn(role="user", text="")], for_generation=True)
    ]  # system prompt and all
    return Precomputable(vlm, compute, "row", {"frame": frame}, same=same, by_default=False)


def stored_rows(batch: Batch) -> list[Tensor]:
    """The entry of each row; empty ones where a selection of rows has lost them."""
    whole, lengths = batch.extras[PREFIX], batch.extras.get(f"{PREFIX}.lengths")
    if lengths is None or len(lengths) != len(batch) or int(lengths.sum()) != len(whole):
        return [whole[:0]] * len(batch)
    return list(whole.split(lengths.tolist()))


def stored_width(vlm: PrefixBackbone) -> int:
    """Columns F of what ``to_store`` gives."""
    layers, heads, size = vlm.cache_shape
    return max(2 * layers * heads * size, vlm.width) + _DIGITS


def to_store(vlm: PrefixBackbone, inputs: VLMInputs, rows: Sequence[int]) -> list[Tensor]:
    """What the model makes of some rows, each ``[n + 1, F]``: a line per real token, then the last state.

    A line holds the keys and values of all layers and, in three columns, the token itself: whoever reads it can tell whether it is
    of the same text.
    """
    inputs = inputs_of_rows(inputs, rows)
    prefix = vlm.prefix(inputs)
    kept: list[Any] = list(prefix.cache.layers)
    parts = [part.transpose(1, 2).flatten(2) for layer in kept for part in (layer.keys, layer.values)]
    states = torch.cat(parts, dim=-1).float()  # [R, L, 2 * layers * heads * size]
    room = stored_width(vlm) - _DIGITS
    whole = F.pad(states, (0, room - states.shape[-1]))
    tokens = torch.stack([inputs.token_ids // _BASE**place % _BASE for place in range(_DIGITS)], dim=-1).float()
    lines = torch.cat([whole, tokens], dim=-1)  # [R, L, F]
    last = F.pad(prefix.last_hidden.float(), (0, room + _DIGITS - vlm.width))
    return [torch.cat([lines[row][inputs.attention_mask[row]], last[row : row + 1]]) for row in range(len(rows))]


def prefix_with_stored(vlm: PrefixBackbone, inputs: VLMInputs, stored: Sequence[Tensor]) -> Prefix:
    """``vlm.prefix(inputs)``, computed only for rows whose entry (of ``to_store``) is missing, empty or of another text.

    A model that is sharded over ranks always reads a row: its layers gather their weights from all ranks, which must come together.
    """
    known = [row for row, entry in enumerate(stored) if _is_of(entry, inputs, row)]
    if len(known) == len(stored) and _is_sharded(vlm):
        known = known[1:]
    missing = [row for row in range(len(stored)) if row not in set(known)]
    if not known:
        return vlm.prefix(inputs)
    layers, heads, size = vlm.cache_shape
    shape = (*inputs.token_ids.shape, layers, 2, heads, size)
    device, dtype = inputs.embeddings.device, inputs.embeddings.dtype
    whole = torch.zeros(shape, device=device, dtype=dtype)  # [B, L, layers, 2, heads, size]
    last = torch.zeros(len(inputs.token_ids), vlm.width, device=device, dtype=dtype)
    for row in known:
        lines = stored[row].to(device=device, dtype=dtype)
        used = layers * 2 * heads * size
        whole[row, inputs.attention_mask[row]] = lines[:-1, :used].unflatten(-1, shape[2:])
        last[row] = lines[-1, : vlm.width]
    if missing:
        computed = vlm.prefix(inputs_of_rows(inputs, missing))
        for layer in range(layers):
            kept: Any = computed.cache.layers[layer]
            whole[missing, :, layer, 0] = kept.keys.transpose(1, 2).to(dtype)
            whole[missing, :, layer, 1] = kept.values.transpose(1, 2).to(dtype)
        last[missing] = computed.last_hidden.to(dtype)
    cache = DynamicCache()
    for layer in range(layers):
        keys, values = (whole[:, :, layer, part].transpose(1, 2) for part in (0, 1))
        cache.update(keys, values, layer)
    return Prefix(cache, inputs.attention_mask, inputs.position_ids.amax(dim=(0, 2)) + 1, last)


def inputs_of_rows(inputs: VLMInputs, rows: Sequence[int]) -> VLMInputs:
    """Some rows of a batch, padding and all."""
    index = torch.tensor(list(rows), dtype=torch.long, device=inputs.token_ids.device)
    return VLMInputs(
        inputs.token_ids[index],
        inputs.embeddings[index],
        inputs.attention_mask[index],
        inputs.position_ids[..., index, :],
        inputs.labels[index],
        inputs.image_mask[index],
    )


def _is_of(entry: Tensor, inputs: VLMInputs, row: int) -> bool:
    tokens = inputs.token_ids[row][inputs.attention_mask[row]]
    if len(entry) != len(tokens) + 1 or bool(inputs.image_mask[row].any()):
        return False
    digits = entry[:-1, -_DIGITS:].to(tokens.device).long()
    return torch.equal(sum(digits[:, place] * _BASE**place for place in range(_DIGITS)), tokens)


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
