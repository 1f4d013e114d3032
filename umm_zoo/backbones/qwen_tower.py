"""Towers of the Qwen-VL family over images of any sizes: what the library would read off a device is made on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from umm_zoo.backbones.devices import send
from umm_zoo.backbones.segments import SEGMENTED, has_flash, of_one_length, segments

#: Rows and columns of patches of an image.
Patches = tuple[int, int]


def batch_segments(tower: Any) -> None:
    """Let a tower whose attention is ``sdpa`` take images and windows in few calls; on a GPU in half precision in one, of flash."""
    if tower.config._attn_implementation == "sdpa":
        tower.config._attn_implementation = SEGMENTED


def encode(tower: Any, pixels: Tensor, sizes: Sequence[Patches]) -> Any:
    """The library's output of a tower, see its ``forward``; nothing is read from the device.

    Args:
        tower: Qwen2-VL's, Qwen2.5-VL's or Qwen3-VL's.
        pixels: patches of all images, one image behind another.
        sizes: of each image.
    """
    pixels = pixels.type(tower.dtype)
    config, device = tower.config, pixels.device
    heads, width = config.num_heads, getattr(config, "embed_dim", None) or config.hidden_size
    flash = has_flash(device, pixels.dtype, width // heads)
    windows = (config.window_size, config.patch_size) if hasattr(tower, "window_size") else None
    places = (tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners) if _has_places(tower) else None
    make = _plan.__wrapped__ if device.type == "meta" else _plan  # integers have numbers there within a trial step alone
    plan = make(tuple(sizes), tower.spatial_merge_size, windows, places, device, flash, config._attn_implementation)
    return tower(pixels, grid_thw=_grid(sizes), return_dict=True, **plan)


def _has_places(tower: Any) -> bool:
    """Whether a tower has embeddings of places, which are interpolated."""
    return hasattr(tower, "num_grid_per_side")


def _grid(sizes: Sequence[Patches]) -> Tensor:
    return torch.tensor([[1, *size] for size in sizes], dtype=torch.long).view(-1, 3)


@lru_cache(maxsize=32)
def _plan(
    sizes: tuple[Patches, ...],
    merge: int,
    windows: tuple[int, int] | None,
    places: tuple[int, str, bool] | None,
    device: torch.device,
    flash: bool,
    attention: str,
) -> dict[str, Any]:
    """What a tower computes from the sizes of its images, in the library's names; the same for all batches of these sizes.

    Args:
        sizes, merge: see ``encode``; patches along the side of a token.
        windows: side in pixels of a window and of a patch; None without windows.
        places: side of the table of embeddings, and how it is interpolated; None without one.
        device: of the pixels.
        flash: see ``segments``.
        attention: the library's name of the tower's.
    """
    with torch.inference_mode(False), torch.no_grad():  # they may be met in training later
        grid, unit = _grid(sizes), merge**2
        whole = [h * w for h, w in sizes]
        plan: dict[str, Any] = {"position_ids": send(get_vision_position_ids(grid, merge), device)}
        owners: Tensor | None = None
        if windows is not None:
            side, patch = windows
            index, borders = get_vision_window_index(grid, merge, side, patch)
            lengths = borders.diff().tolist()
            if attention == SEGMENTED and not flash:
                chosen, parts = of_one_length(lengths), index.split([length // unit for length in lengths])
                index, lengths = torch.cat([parts[number] for number in chosen]), [lengths[number] for number in chosen]
            plan |= {"window_index": send(index, device), **_bounds("window_", lengths, None, device, flash, attention)}
            owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(whole) // unit)[index].repeat_interleave(unit)
        # among windows of one length the patches of an image need not be neighbours
        plan |= _bounds("", whole, None if owners is None else owners.argsort(stable=True), device, flash, attention)
        if places is not None:
            made = get_vision_interpolation_indices_and_weights(grid, *places, merge)
            plan |= {name: send(one, device) for name, one in zip(("interp_indices", "interp_weights"), made, strict=True)}
    return plan


def _bounds(
    name: str, lengths: list[int], places: Tensor | None, device: torch.device, flash: bool, attention: str
) -> dict[str, Any]:
    """Segments in the library's names; for its own attention their borders, on the device where a kernel reads them."""
    if attention == SEGMENTED:
        made: Any = segments(lengths, places, device, flash)
    else:
        made = torch.tensor([0, *lengths]).cumsum(0).int()
        made = send(made, device) if "flash" in attention else made
    return {f"cu_{name}seqlens": made, f"max_{name}seqlen": max(lengths)}
