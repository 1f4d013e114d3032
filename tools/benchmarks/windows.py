"""Qwen2.5-VL's vision tower: windows and images of one length in one call of attention, against the library's loop over them.

Images of ``side`` pixels with patches of 4: as many patches and windows as images of 3.5 times the side have in the published
models. ``unequal`` ones have ``side`` or less. ``calls`` is how often attention is called, in all layers.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from tools.benchmarks import base
from tools.benchmarks.base import Numbers, Options

UNIT, OWN = "batch", ("ours",)
#: ``side`` in pixels; ``width`` and ``layers`` of the tower, every second of which has no windows.
SIZES: dict[str, Any] = {"images": 8, "side": 128, "width": 128, "layers": 4, "steps": 6}
SMALLEST = {"images": 2, "side": 40, "width": 16, "layers": 2, "steps": 1}


def cases(options: Options) -> list[tuple[str, str]]:
    """Sizes of images, and whether the tower learns."""
    return [
        (f"{sizes}, {kind}", arm)
        for sizes in ("equal", "unequal")
        for kind in ("forward", "forward and backward")
        for arm in ("ours", "library")
    ]


def missing(options: Options, arm: str) -> str:
    """Nothing is needed."""
    return ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """A batch through the tower."""
    sizes, _, kind = setting.partition(", ")
    torch.manual_seed(0)
    vlm = base.small_qwen(32, 1, 2, 1, options.width, options.layers).to(options.device)
    images = [image.to(options.device) for image in photographs(options, sizes == "equal")]
    learns = kind == "forward and backward"

    def work() -> None:
        with nullcontext() if learns else torch.no_grad():
            made = tokens(vlm, images, arm)
        if learns:
            made.square().mean().backward()

    seconds = base.timed(work, options.steps, options.device)
    with patch.object(functional, "scaled_dot_product_attention", wraps=functional.scaled_dot_product_attention) as counted:
        tokens(vlm, images, arm)
    return {"seconds": seconds, "calls": float(counted.call_count), "gflop": base.gflop(work)}


def photographs(options: Options, equal: bool) -> list[Tensor]:
    """Noise of equal sizes, or of sizes a step of a token apart."""
    sides = [options.side if equal else options.side - 8 * (number % 4) for number in range(options.images)]
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, options.side, side, generator=generator) * 2 - 1 for side in sides]


def tokens(vlm: Any, images: list[Tensor], arm: str) -> Tensor:
    """What enters the language model, ``[sum of tokens, D]``."""
    if arm == "ours":
        return torch.cat(vlm.encode_images(images))
    tower, merge = vlm.model.model.visual, vlm.layout.merge_size
    tower.config._attn_implementation = "sdpa"
    grids = [vlm.layout.grid(*image.shape[-2:]) for image in images]
    sizes = torch.tensor([[1, grid.h * merge, grid.w * merge] for grid in grids], device=images[0].device)
    made: Tensor = tower(vlm.layout.patches(images), grid_thw=sizes, return_dict=True).pooler_output
    return made
