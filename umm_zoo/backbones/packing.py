"""Packing: rows of a batch one behind another, without their padding, each attending to itself alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from umm_zoo.backbones.base import VLMInputs, places_of, put
from umm_zoo.backbones.decoder_attention import reads_no_masks
from umm_zoo.backbones.devices import send
from umm_zoo.backbones.segments import Segments, has_flash, segments
from umm_zoo.errors import UserError


@dataclass
class PackedRows:
    """Rows as segments of one sequence.

    Args:
        places: ``[T]``, numbers in ``[B * L]`` of the tokens that are no padding.
        segments: of the sequence of these, a row each.

    Attributes:
        met: whether an attention has kept rows apart; a decoder that hands nothing on to its layers would mix them.
    """

    places: Tensor
    segments: Segments
    met: bool = field(default=False, init=False)

    @classmethod
    def of(cls, mask: Tensor, decoder: Any, device: torch.device) -> PackedRows:
        """Those of a mask ``[B, L]`` of the host."""
        config = decoder.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        flash = has_flash(device, decoder.dtype, head)
        return cls(send(places_of(mask), device), segments(mask.sum(1).tolist(), None, device, flash, regroup=False))

    def pack(self, inputs: VLMInputs) -> VLMInputs:
        """The inputs as one row ``[1, T]``; positions begin again with each of theirs."""
        names = ("token_ids", "embeddings", "labels", "image_mask", "attention_mask", "deepstack")
        rows = {name: own for name in names if (own := getattr(inputs, name)) is not None}
        packed = {name: own.flatten(0, 1).index_select(0, self.places)[None] for name, own in rows.items()}
        ids = inputs.position_ids.flatten(-2).index_select(-1, self.places).unsqueeze(-2)
        return replace(inputs, **packed, position_ids=ids, padded=False, image_places=None, label_places=None)

    def unpack(self, hidden: Tensor, inputs: VLMInputs) -> Tensor:
        """States ``[1, T, D]`` as rows ``[B, L, D]``, zeros on padding.

        Raises:
            UserError: nothing has kept the rows apart.
        """
        if not self.met:
            raise UserError("method.packing", "a language model that hands nothing on to its layers", "packing: false")
        return put(hidden.new_zeros(*inputs.token_ids.shape, hidden.shape[-1]), self.places, hidden[0])


def assert_packs(decoder: Any) -> None:
    """Refuse to pack rows for a decoder that could not keep them apart.

    Raises:
        UserError: says why.
    """
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or [])
    windows = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
    if not reads_no_masks(decoder):
        raise UserError(
            "method.packing", f"a {config.model_type} with attention '{config._attn_implementation}'", "attention: sdpa"
        )
    if windows or kinds - {"full_attention", "sliding_attention"}:
        found = f"a {config.model_type} whose layers attend in other ways than to all that stands before"
        raise UserError("method.packing", found, "full attention in every layer", "packing: false")
