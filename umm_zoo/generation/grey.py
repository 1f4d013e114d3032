"""Grey images of more than 8 bits, the same way wherever a file is opened."""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
#: Pixels that are converted at a time, so that memory goes with the image itself; smaller images are not shrunk on the way.
_STRIP = 1 << 22


def eight_bit(image: Image.Image, least: tuple[int, int] | None = None) -> Image.Image:
    """Grey of 12, 16 or 32 bits as 8 bits, by the file's own range and never by what this one image holds: a dark one stays dark.

    White is 1 in floating point, and the largest number of the type otherwise. PIL's own ``convert`` would clip everything above
    255 to white. An image of another mode is returned as it is.

    Args:
        image: opened.
        least: width and height that a large one may be shrunk to on the way, by up to 8 as in JPEG; None keeps every pixel.

    Raises:
        ValueError: the file does not say which value is white, or holds some beyond it.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    tags = getattr(image, "tag_v2", {})  # of a TIFF; PIL brings the integers of other formats to 16 bits
    if tags and image.mode == "I":
        raise ValueError("grey of 32 bits or with a sign: the file does not say which value is white")
    white = 1.0 if image.mode == "F" else float(2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1)
    image.load()  # of some formats it turns the image
    (width, height), transparent = image.size, image.info.get("transparency")
    factor = 1 if least is None or width * height <= _STRIP else max(1, min(width // least[0], height // least[1], 8))
    made = Image.new("L", (-(-width // factor), -(-height // factor)))
    rows = max(1, _STRIP // width // factor) * factor
    for top in range(0, height, rows):
        values = np.asarray(image.crop((0, top, width, min(top + rows, height))), dtype=np.float32)
        if not (values.min() >= 0 and values.max() <= white):
            raise ValueError(f"grey values from {values.min():g} to {values.max():g}, expected 0 to {white:g}")
        levels = (values * (255 / white) + 0.5).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            levels = 255 - levels
        if transparent is not None:
            levels[values == transparent] = 255
        made.paste(Image.fromarray(levels).reduce(factor), (0, top // factor))
    return made
