"""What input images and images to generate go through on their way into a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipelines.transforms.resize import Resize
from umm_zoo.batch import Crop
from umm_zoo.errors import locating

#: Width to height of photographs, the square first.
_RATIOS = (1.0, *(2.0 ** (step / 8) for step in range(-8, 9) if step))


class SizedResize(NamedTuple):
    """An image policy and its ``size``."""

    resize: Resize
    size: int

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what is made of an upright image of this width and height."""
        return self.resize.output_size(width, height, self.size)

    def num_images(self, width: int, height: int) -> int:
        """How many images are made of one."""
        return self.resize.num_images(width, height, self.size)

    def crop(self, width: int, height: int) -> Crop:
        """What is cut away of an image."""
        return self.resize.crop(width, height, self.size)


@dataclass(frozen=True)
class ImageTransform:
    """Sizes of input images and of images to generate, and the policies that bring them to these.

    Raises:
        UserError: a policy has no image of its size.
    """

    image_size: int
    target_size: int
    resize: Resize
    target_resize: Resize | None = None

    def __post_init__(self) -> None:
        for name, (resize, size) in (("resize", self.inputs), ("target_resize", self.targets)):
            with locating(place=f"data.{name}"):
                resize.check(size)

    @property
    def inputs(self) -> SizedResize:
        """For input images."""
        return SizedResize(self.resize, self.image_size)

    @property
    def targets(self) -> SizedResize:
        """For images to generate."""
        return SizedResize(self.target_resize or self.resize, self.target_size)

    def shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Width and height of an input image and of an image to generate, for a trial of what takes them.

        As they come of a square, and of those photographs whose sides then have the smallest common factor.
        """
        shown, generated = self.inputs, self.targets
        made = [
            (shown.output_size(*_photograph(ratio, shown.size)), generated.output_size(*_photograph(ratio, generated.size)))
            for ratio in _RATIOS
        ]
        odd = min(made, key=lambda pair: math.gcd(*pair[0])), min(made, key=lambda pair: math.gcd(*pair[1]))
        return list(dict.fromkeys([made[0], *odd]))

    def to_json(self) -> dict[str, Any]:
        """Steps of the transform, in plain values: the identity of what is computed from its images."""
        stated = {"image_size": self.image_size, "target_size": self.target_size, "resize": _stated(self.resize)}
        return stated if self.target_resize is None else {**stated, "target_resize": _stated(self.target_resize)}


def _photograph(ratio: float, size: int) -> tuple[int, int]:
    """Width and height with about as many pixels as a square of edge ``size``."""
    return max(1, round(size * math.sqrt(ratio))), max(1, round(size / math.sqrt(ratio)))


def _stated(resize: Resize) -> list[Any]:
    return [type(resize).__name__, {name: str(value) for name, value in sorted(vars(resize).items())}]
