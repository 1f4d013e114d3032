"""LLaVA whose tower cannot see the marks of the shapes world: a control, for no training can bring back what was never seen."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.llava import LlavaBackbone

#: Pixels, at 32 x 32 px: the smallest odd window after which a probe of the shipped tower finds the mark no better than by chance.
WINDOW = 7


class MarkBlindLlava(LlavaBackbone):
    """``LlavaBackbone`` whose images are opened and closed by grey-scale morphology before its tower sees them.

    Details narrower than seven pixels are gone, light ones and dark ones: marks are. Colours and sizes stay, shapes nearly.
    Whatever else reads the images, a reconstruction target for one, sees them as they are.
    """

    def normalise(self, images: Tensor) -> Tensor:
        """Erased, shifted and scaled. Shape: ``[M, 3, H, W]`` both."""
        return super().normalise(erased(images))


def erased(images: Tensor, window: int = WINDOW) -> Tensor:
    """Images without their narrow details: opened, then closed, each colour by itself. Shape: ``[M, 3, H, W]`` both."""
    opened = _widest(_narrowest(images, window), window)
    return _narrowest(_widest(opened, window), window)


def _widest(images: Tensor, window: int) -> Tensor:
    return F.max_pool2d(images, window, 1, window // 2)


def _narrowest(images: Tensor, window: int) -> Tensor:
    return -_widest(-images, window)
