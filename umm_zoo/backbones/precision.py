"""What stays exact when a whole model is cast to half precision (``trainer.precision: bf16-true``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


class ExactBuffers(nn.Module):
    """Mixin of modules with buffers, their own or below them, that a cast to half precision leaves as they are.

    In bfloat16 the frequencies of rotary positions are off by up to 1 in 256: at position 1,000 by whole turns. The running
    statistics of a codec would not move at all.

    Attributes:
        exact: names of the buffers.
    """

    exact: ClassVar[tuple[str, ...]] = ("inv_freq", "original_inv_freq")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if name in self.exact and buffer is not None and buffer.dtype not in _HALF
        ]
        super()._apply(fn, recurse)
        for module, name, before in kept:
            after: Any = module._buffers[name]
            if after.dtype in _HALF:
                module._buffers[name] = before.to(after.device)
        return self


def antialiased(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Images resized as image processors do, in float32 or wider; torch computes the weights in the default dtype.

    Shape:
        - images: ``[B, C, H, W]``
        - output: ``[B, C, *size]``, not clamped
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        wide = images.float() if images.dtype in _HALF else images
        return F.interpolate(wide, size=size, mode=mode, antialias=True, align_corners=False)
    finally:
        torch.set_default_dtype(before)


def resize_to(images: Tensor, size: int, crop_from: int | None, mode: str = "bicubic") -> Tensor:
    """Square images of ``size``, as the stock image processors make them (antialiased).

    Args:
        images: ``[B, 3, H, W]``; returned as they are where there is nothing to resize and to cut.
        size: side of the result in pixels.
        crop_from: length the shorter side gets before the centre is cut out; None squeezes the whole image into the square.
        mode: ``bicubic`` or ``bilinear``.

    Shape:
        - output: ``[B, 3, size, size]``
    """
    height, width = images.shape[-2:]
    if crop_from is None:
        target = (size, size)
    else:
        short = min(height, width)
        target = (int(crop_from * height / short), int(crop_from * width / short))
    if target != (height, width):
        images = antialiased(images, target, mode).clamp(-1, 1).to(images.dtype)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return images[..., top : top + size, left : left + size]
