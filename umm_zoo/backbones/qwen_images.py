"""Images as the Qwen2-VL family's vision tower takes them, computed from tensors with plain torch.

The library's own processors start from files or PIL images (and its faster one needs torchvision); training data arrives here
as a batch of tensors, and rewards or reconstructions even arrive with a gradient.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from umm_zoo.backbones.by_shape import constants
from umm_zoo.backbones.loading import image_processor_of
from umm_zoo.backbones.precision import antialiased
from umm_zoo.batch import Grid, Images, map_by_size


@dataclass(frozen=True)
class PatchLayout:
    """Resizing, normalising and cutting of an image.

    The tower takes flattened patches in groups of ``merge_size x merge_size`` neighbours, because its merger turns each group into
    one language-model token; the groups are in raster order. A still image fills all ``temporal_size`` frames of a patch.

    Args:
        patch_size: pixels per patch side (14 in the published models).
        merge_size: patches per token side.
        temporal_size: frames per patch.
        min_pixels, max_pixels: bounds on the area of an image; smaller and larger images are resized. None is 4 and 16,384 tokens:
            the published 3,136 and 12,845,056 where a token is 28 x 28 pixels.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_size: int = 2
    min_pixels: int | None = None
    max_pixels: int | None = None

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest area, in pixels."""
        return self.min_pixels or 4 * self.factor**2, self.max_pixels or 16384 * self.factor**2

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one token."""
        return self.patch_size * self.merge_size

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that an image is resized to: multiples of ``factor``, aspect ratio nearly kept.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        if max(height, width) > 200 * min(height, width):
            raise ValueError(f"found an image of {height} x {width} pixels, expected no side more than 200 times the other")
        height, width = smart_resize(height, width, self.factor, *self.limits)
        return height, width

    def grid(self, height: int, width: int) -> Grid:
        """Grid of language-model tokens of an image of that size."""
        height, width = self.resized(height, width)
        return Grid(height // self.factor, width // self.factor)

    def patches(self, images: Images) -> Tensor:
        """Resize, normalise and cut images; differentiable.

        The library rounds resized images to 8 bits; here they stay continuous.

        Shape:
            - images: M of ``[3, H, W]`` in [-1, 1], of any sizes
            - output: ``[sum of h * w * merge_size**2, 3 * temporal_size * patch_size**2]``, image after image
        """
        return torch.cat(map_by_size(self._cut, images))

    def _cut(self, images: Tensor) -> Tensor:
        """Patches of images of one size, ``[M, h * w * merge_size**2, ...]``."""
        size = self.resized(*images.shape[-2:])
        pixels = images.float() / 2 + 0.5
        if size != tuple(images.shape[-2:]):
            pixels = antialiased(pixels, size, "bicubic").clamp(0, 1)
        mean, std = (
            constants(images.device, tuple(values), torch.float32).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )
        pixels = (pixels - mean) / std  # [M, 3, H, W]
        m, p = self.merge_size, self.patch_size
        h, w = (side // self.factor for side in size)  # resizing the new size may give another: limits are passed by rounding
        cut = pixels.view(-1, 3, h, m, p, w, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)  # [M, h, w, m, m, 3, p, p]
        cut = cut.unsqueeze(6).expand(*cut.shape[:6], self.temporal_size, p, p)  # a still image fills every frame
        return cut.reshape(len(images), -1, 3 * self.temporal_size * p * p)

    # -- the library's file --------------------------------------------------------------------------------------------------

    @property
    def _file(self) -> dict[str, Any]:
        """The words of ``preprocessor_config.json`` on the cut and the normalisation, which are CLIP's."""
        return {
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_size,
            "image_mean": list(OPENAI_CLIP_MEAN),
            "image_std": list(OPENAI_CLIP_STD),
        }

    def save(self, folder: Path) -> None:
        """Write ``preprocessor_config.json`` as the library's own processor reads it."""
        size = dict(zip(("shortest_edge", "longest_edge"), self.limits, strict=True))
        config = {"image_processor_type": "Qwen2VLImageProcessor", **self._file, "size": size}
        (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def limits_from(self, source: str) -> tuple[int, int]:
        """``(min_pixels, max_pixels)`` of a checkpoint's image processor, of either generation of its keys; else those given here.

        What a processor leaves out has the library's default, which is less than the published checkpoints'.

        Raises:
            ValueError: it normalises or cuts differently.
        """
        config = image_processor_of(source)
        for key, value in self._file.items():
            if config.get(key, value) != value:
                raise ValueError(f"{source}: image processor: {key}: found {config[key]}, expected {value}")
        if not config:
            return self.limits
        size = config.get("size", {})
        smallest = config.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        return smallest, config.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
