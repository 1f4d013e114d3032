"""Image files of a user, opened. Nothing here imports torch."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

from PIL import Image

from umm_zoo.errors import UserError, printable
from umm_zoo.generation.grey import eight_bit
from umm_zoo.generation.metadata import pixels_only, turn_of


def open_image(path: Path, place: str = "") -> Image.Image:
    """Any file that PIL opens as an upright RGB image; transparency is laid on white.

    Raises:
        UserError: there is no such file, or no image in it; ``place`` is where the file was named.
    """
    where = ": ".join(filter(None, [place, printable(str(path))]))
    if not os.path.isfile(path):  # also where the name is longer than a file system takes
        raise UserError(where, "a folder" if os.path.isdir(path) else "no such file", "an image")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(where, f"no readable image ({type(error).__name__})", "PNG, JPEG, WebP ...") from error
    return read_image(content, where)


def read_image(content: bytes, where: str, most_pixels: int | None = None, formats: tuple[str, ...] | None = None) -> Image.Image:
    """The image of a file's bytes, see ``open_image``.

    Args:
        content: the bytes.
        where: their name, for messages.
        most_pixels: larger images are refused, before their pixels are read.
        formats: PIL's names of those that are read; None is all.

    Raises:
        UserError: there is no image in them, or too large a one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata and large images, which are the user's own
            with Image.open(io.BytesIO(pixels_only(content)), formats=formats) as opened:
                if most_pixels is not None and opened.width * opened.height > most_pixels:
                    raise UserError(where, f"an image of {opened.width} x {opened.height} px", f"at most {most_pixels} px")
                opened.load()
                return on_white(opened)
    except UserError:
        raise
    except Exception as error:  # PIL's decoders raise whatever a damaged file makes them raise
        reason = f"{type(error).__name__}: {str(error)[:120]}" if isinstance(error, ValueError) else type(error).__name__
        raise UserError(where, f"no readable image ({reason})", "PNG, JPEG, WebP ...") from error


def on_white(opened: Image.Image) -> Image.Image:
    """An opened image as an upright RGB one; transparency is laid on white.

    Raises:
        ValueError: grey of more than 8 bits that does not say which value is white.
    """
    image, turn = eight_bit(opened).convert("RGBA"), turn_of(opened)
    image = image if turn is None else image.transpose(turn)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
