"""Tensors as images, and images as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from umm_zoo.errors import UserError


def tensor_image(image: Any) -> Image.Image:
    """A tensor ``[3, H, W]``, floats in [-1, 1] or bytes, as an 8-bit image.

    Raises:
        UserError: it is none, of another shape, or holds other values.
    """
    expected = "a path, an opened image, or a tensor [3, H, W] in [-1, 1] or of uint8"
    if not isinstance(image, Tensor):
        raise UserError("image", f"a {type(image).__name__}", expected)
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise UserError("image", f"a tensor {list(image.shape)}", expected)
    if image.dtype == torch.uint8:
        return to_pil(image.float() / 127.5 - 1)
    low, high = image.min().item(), image.max().item()
    if not image.is_floating_point() or not (low >= -1.01 and high <= 1.01):  # decoders overshoot a little; NaN compares as false
        raise UserError("image", f"a tensor of {image.dtype} with values from {low:g} to {high:g}", expected)
    return to_pil(image)


def to_pil(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [-1, 1] as 8-bit RGB; values outside are clamped."""
    levels = (image.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy(), "RGB")


def from_pil(image: Image.Image) -> Tensor:
    """An 8-bit image as ``[3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
