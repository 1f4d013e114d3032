"""Base of the image policies, and the policies that make squares."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from PIL import Image, ImageOps

from umm_zoo.batch import Crop

#: Note in the ``info`` of an image that its decoder has shrunk it.
SHRUNK = "shrunk by the decoder"


class Resize(ABC):
    """Policy that brings an image of any size to a size of its choice.

    The size of what it makes depends on the width and height of the upright image alone, in pixels, and on ``size``: the edge of a
    square, or of one with as many pixels as an image may have (``data.image_size``, ``data.target_size``).
    """

    def __init__(self, resample: str = "bicubic") -> None:
        if resample not in ("nearest", "bilinear", "bicubic", "lanczos"):
            raise ValueError(f"resample: found '{resample}', expected nearest, bilinear, bicubic, lanczos")
        self.resample = Image.Resampling[resample.upper()]

    @abstractmethod
    def output_size(self, width: int, height: int, size: int) -> tuple[int, int]:
        """Width and height of what is made of an image; of each, where it becomes several."""

    @abstractmethod
    def fit(self, image: Image.Image, output: tuple[int, int]) -> Image.Image:
        """``image`` brought to this width and height."""

    def check(self, size: int) -> None:  # noqa: B027 -- most policies take any size
        """Refuse a ``size`` for which the policy has no image, with a ``UserError``."""

    def resized(self, image: Image.Image, output: tuple[int, int]) -> Image.Image:
        """``image`` brought to this width and height, without regard to the aspect ratio."""
        return image if image.size == output else scaled(image, output, self.resample)

    def num_images(self, width: int, height: int, size: int) -> int:
        """How many images are made of one."""
        return 1

    def images(self, image: Image.Image, size: int, full: tuple[int, int] | None = None) -> list[Image.Image]:
        """The images made of one, an image of the whole first; ``full`` is its own size where the decoder has shrunk it."""
        return [self.fit(noted(image, full), self.output_size(*(full or image.size), size))]

    def __call__(self, image: Image.Image, size: int) -> Image.Image:
        """The image made of an upright one; the first, where it becomes several."""
        return self.images(image, size)[0]

    def least(self, width: int, height: int, size: int) -> tuple[int, int]:
        """The smallest width and height to which a decoder may shrink the image on the way without loss for this policy."""
        columns, rows = self.output_size(width, height, size)
        scale = max(columns / width, rows / height)
        return max(columns, int(width * scale)), max(rows, int(height * scale))

    def crop(self, width: int, height: int, size: int) -> Crop:
        """What is cut away of an image; here nothing."""
        columns, rows = self.output_size(width, height, size)
        return Crop((height, width), (rows, columns), (0, 0), (rows, columns))


class Cropping(Resize):
    """Base of policies that resize to cover the output and cut out the centre: nothing is distorted, two ends are lost."""

    def fit(self, image: Image.Image, output: tuple[int, int]) -> Image.Image:
        """Resize the part that is kept in one pass."""
        if SHRUNK in image.info and (box := _centre(image.size, output)) is not None:
            return scaled(image, output, self.resample, box)
        return ImageOps.fit(image, output, self.resample)

    def crop(self, width: int, height: int, size: int) -> Crop:
        """The ends of one edge."""
        columns, rows = self.output_size(width, height, size)
        scale = max(columns / width, rows / height)
        resized = max(rows, round(height * scale)), max(columns, round(width * scale))
        return Crop((height, width), resized, ((resized[0] - rows) // 2, (resized[1] - columns) // 2), (rows, columns))


class Square(Cropping):
    """Resize of the short edge to ``size`` and cut of the centre: nothing is distorted, the ends of the long edge are lost."""

    def output_size(self, width: int, height: int, size: int) -> tuple[int, int]:
        """A square."""
        return size, size


class Squeeze(Resize):
    """Resize of both edges to ``size``: everything is seen, proportions are distorted."""

    def output_size(self, width: int, height: int, size: int) -> tuple[int, int]:
        """A square."""
        return size, size

    def fit(self, image: Image.Image, output: tuple[int, int]) -> Image.Image:
        """Resize without regard to the aspect ratio."""
        return self.resized(image, output)


class PadToSquare(Resize):
    """Resize of the long edge to ``size`` with a border: everything is seen undistorted, at a lower resolution.

    The border has the grey value ``fill``, 0 to 255 (LLaVA fills with the encoder's mean, near 127).
    """

    def __init__(self, fill: int = 127, resample: str = "bicubic") -> None:
        super().__init__(resample)
        self.fill = fill

    def output_size(self, width: int, height: int, size: int) -> tuple[int, int]:
        """A square."""
        return size, size

    def fit(self, image: Image.Image, output: tuple[int, int]) -> Image.Image:
        """Shrink or enlarge, then centre on a square."""
        inner = self.resized(image, self._inside(*image.size, output))
        return centred(inner, output, self.fill)

    def crop(self, width: int, height: int, size: int) -> Crop:
        """Nothing; the border was never part of the image."""
        inner = self._inside(width, height, (size, size))[::-1]
        return Crop((height, width), inner, (0, 0), inner)

    @staticmethod
    def _inside(width: int, height: int, output: tuple[int, int]) -> tuple[int, int]:
        scale = output[0] / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))


def noted(image: Image.Image, full: tuple[int, int] | None) -> Image.Image:
    """``image`` with a note where its decoder has shrunk it from its ``full`` size."""
    if full is not None and image.size != full:
        image.info[SHRUNK] = True
    return image


def scaled(
    image: Image.Image, output: tuple[int, int], resample: Image.Resampling, box: tuple[int, int, int, int] | None = None
) -> Image.Image:
    """An image, or a box of it, at another width and height.

    One that its decoder has shrunk, which is exact to a level or so, goes through torch: the same filter (at most 2 of 255 levels
    from PIL's), three times as fast where the processor has wide registers. All others stay PIL's to the bit.
    """
    mode = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}.get(resample)
    if SHRUNK not in image.info or mode is None or image.mode != "RGB":
        return image.resize(output, resample, box)
    import torch  # slow, and the commands of this package get along without it
    from torch.nn.functional import interpolate

    part = torch.from_numpy(np.array(image if box is None else image.crop(box)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a millisecond of work: to wait for others takes longer
    made = interpolate(part.permute(2, 0, 1)[None], output[::-1], mode=mode, antialias=True)
    torch.set_num_threads(threads)
    return Image.fromarray(np.ascontiguousarray(made[0].permute(1, 2, 0).numpy()))


def _centre(size: tuple[int, int], output: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The largest part in the middle that has the shape of the output; None where its borders are not between pixels."""
    scale = min(size[0] / output[0], size[1] / output[1])
    sides = [scale * side for side in output]
    corner = [(whole - side) / 2 for whole, side in zip(size, sides, strict=True)]
    edges = [*corner, *(start + side for start, side in zip(corner, sides, strict=True))]
    left, top, right, bottom = (round(edge) for edge in edges)
    return (left, top, right, bottom) if all(abs(edge - round(edge)) < 1e-6 for edge in edges) else None


def centred(image: Image.Image, output: tuple[int, int], fill: int) -> Image.Image:
    """``image`` in the middle of a larger one with the grey value ``fill``."""
    canvas = Image.new("RGB", output, (fill,) * 3)
    canvas.paste(image, ((output[0] - image.width) // 2, (output[1] - image.height) // 2))
    return canvas
