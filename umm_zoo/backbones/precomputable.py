"""Outputs of frozen parts that depend on a sample alone, to be computed once and stored beside the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import beside
from umm_zoo.backbones.quantized import held, is_quantized
from umm_zoo.batch import Batch


@dataclass(frozen=True)
class Precomputable:
    """One output of a frozen part. Where it was stored, the batch has it in ``Batch.extras`` under the name that it has in
    ``Method.precomputable()``; where it is absent the method computes it.

    Args:
        part: whose weights decide about the output.
        compute: a tensor with one entry per input image, row or target. May not draw random numbers: what a training draws again (a
            sample of a posterior) is drawn from what is stored.
        per: what an entry belongs to, ``image``, ``row`` or ``target`` (the image that a row asks for).
        settings: plain values that decide as well and are no weights.
    """

    part: nn.Module
    compute: Callable[[Batch], Tensor]
    per: Literal["image", "row", "target"]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self, transform: Mapping[str, Any]) -> str:
        """Hash of the weights, the settings, and the transform that images come through."""
        stated = json.dumps({"settings": dict(self.settings), "transform": dict(transform)}, sort_keys=True)
        return hashlib.sha256((weights_hash(self.part) + stated).encode()).hexdigest()


@torch.no_grad()
def weights_hash(part: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of all parameters and buffers, those that checkpoints leave out included, and of
    an adapter's additions beside them."""
    digest = hashlib.sha256()
    added = [(f"{name}+{own}", tensor) for name, _, more in beside(part) for own, tensor in more.named_parameters()]
    own = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    plain = {name: tensor for name, tensor in own.items() if not is_quantized(tensor)}
    for name, tensor in sorted([*{**plain, **dict(held(part))}.items(), *added]):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a sharded one
        digest.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
