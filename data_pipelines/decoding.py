"""Decoders of untrusted bytes: images made upright and RGB, text, JSON and arrays.

What cannot be used raises ``BadSampleError``. Converters and the loader decode with the same functions: what one takes, the
other takes.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from umm_zoo.backbones.weight_files import stands_for
from umm_zoo.errors import UserError
from umm_zoo.generation.grey import eight_bit
from umm_zoo.generation.metadata import SWAPS, pixels_only, turn_of

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipelines.transforms.resize import Resize

ImageFile.LOAD_TRUNCATED_IMAGES = False  # a truncated image is a bad sample, not a grey one

#: Formats opened; others (PSD, EPS, FITS …) run decoders that training data never needs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
#: Images with more pixels than this are refused before they are decoded (our choice: PIL's own limit for a warning).
MAX_PIXELS = 89_478_485


class BadSampleError(ValueError):
    """Error of one sample that cannot be used; the message is the reason that the ledger records."""


@contextmanager
def one_sample(what: str = "sample cannot be parsed") -> Iterator[None]:
    """Whatever a parser raises over one sample, as a ``BadSampleError``: no list of exceptions is ever complete."""
    try:
        yield
    except (BadSampleError, UserError):
        raise
    except Exception as error:
        raise BadSampleError(f"{what} ({type(error).__name__}: {str(error)[:120]})") from error


class Decoded(NamedTuple):
    """Images made of one, an image of the whole first, and the width and height that the upright one had in its file.

    Shape:
        - images: ``[H, W, 3]`` uint8 each
    """

    images: list[NDArray[np.uint8]]
    full: tuple[int, int]


def decode_image(content: bytes, size: int, resize: Resize, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode untrusted bytes to the one image that a policy makes of them, or the first, see ``decode_images``.

    Shape:
        - output: ``[H, W, 3]`` uint8
    """
    return decode_images(content, size, resize, max_pixels).images[0]


def decode_images(content: bytes, size: int, resize: Resize, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode untrusted bytes to RGB images as a policy makes them.

    Of an animation the first frame is taken; transparency is laid on white; 16-bit and CMYK images are converted; the EXIF
    orientation is applied.
    """
    with open_image(content, max_pixels) as image:
        full = upright_size(image)
        least = resize.least(*full, size)
        made = decoded(image, least if full == image.size else least[::-1])  # decoders know the file's own width and height
        return Decoded([np.asarray(one) for one in resize.images(made, size, full)], full)


@contextmanager
def open_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image opened from untrusted bytes; whatever goes wrong while it is open and decoded becomes a ``BadSampleError``."""
    if not content:
        raise BadSampleError("image of 0 bytes")
    with one_sample("image cannot be decoded"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of what is checked below, and of odd EXIF blocks
        try:
            opened = Image.open(io.BytesIO(pixels_only(content)), formats=FORMATS)
        except UnidentifiedImageError as error:
            wrong = stands_for(content[:512])
            said = f"not an image: {wrong}" if wrong else f"not an image of an expected format ({', '.join(FORMATS)})"
            raise BadSampleError(said) from error
        with opened as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadSampleError(f"image of {width} x {height} pixels, over the limit of {max_pixels}")
            yield image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it stands upright; nothing is decoded for it."""
    turned = image.format != "TIFF" and turn_of(image) in SWAPS  # PIL gives a TIFF's size as it will be
    return (image.height, image.width) if turned else image.size


def decoded(image: Image.Image, least: tuple[int, int] | None = None) -> Image.Image:
    """An opened image decoded to its end and made RGB; the decoder may shrink it on the way, but not below ``least``."""
    if least is not None:
        image.draft(None, least)  # JPEG's decoder halves on the fly, which is most of the cost of a large photo
    image.load()
    return to_rgb(image, least)


def to_rgb(image: Image.Image, least: tuple[int, int] | None = None) -> Image.Image:
    """The image upright, opaque and in 8-bit RGB; grey of 16 bits may be shrunk on the way, see ``eight_bit``."""
    if image.mode == "RGB" and "transparency" not in image.info:
        upright = image
    elif image.mode.startswith(("I", "F")):
        upright = eight_bit(image, least).convert("RGB")
    elif image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        clear = image if image.mode == "RGBA" else image.convert("RGBA")
        upright = Image.new("RGB", clear.size, "white")
        upright.paste(clear, mask=clear)
    else:
        upright = image.convert("RGB")
    turn = turn_of(image)
    return upright if turn is None else upright.transpose(turn)


def decode_text(content: bytes, max_characters: int) -> str:
    """Decode a caption."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"text is not UTF-8 (byte {error.start})") from error
    if len(text) > max_characters:
        raise BadSampleError(f"text of {len(text)} characters, over the limit of {max_characters}")
    return text.strip()


def parse_json(text: str, finite: bool = True) -> Any:
    """The value of a JSON text; numbers that are not ``finite`` pass where data frames wrote them and a converter sees to them.

    Raises:
        BadSampleError: whatever the parser refuses (nested too deep, over 4,300 digits …); NaN, Infinity and numbers that no float
            holds; a key that stands twice in an object: nobody knows which value is meant; half a surrogate pair, which no
            tokenizer and no file takes.
    """
    with one_sample("json cannot be parsed"):
        value = (_STRICT if finite else LENIENT).decode(text)
        if "\\ud" in text or "\\uD" in text:
            check_utf8(json.dumps(value, ensure_ascii=False))
        return value


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise BadSampleError(f"the number {digits:.40}, which no float holds")
    return value


def _no_constant(name: str) -> Any:
    raise BadSampleError(f"the number {name}, which JSON does not have")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values (``json``'s ``object_pairs_hook``), or a ``BadSampleError``."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadSampleError(f"key twice in one object: '{next(name for name in names if names.count(name) > 1)}'"[:120])
    return made


#: Decoders behind `parse_json`.
LENIENT = json.JSONDecoder(object_pairs_hook=unique_keys)
_STRICT = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=_finite, parse_constant=_no_constant)


def check_utf8(text: str) -> str:
    """``text``, or a ``BadSampleError`` where it holds half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(f"text that is not UTF-8: it holds {text[error.start]!a}") from error
    return text


def decode_json(content: bytes, max_characters: int, finite: bool = True) -> dict[str, Any]:
    """Decode a JSON object as ``parse_json`` does."""
    value = parse_json(decode_text(content, max_characters), finite)
    if not isinstance(value, dict):
        raise BadSampleError(f"json holds a {type(value).__name__}, an object is needed")
    return value


def decode_array(content: bytes) -> Tensor:
    """Decode a ``.npy`` member; objects are refused, so nothing is unpickled."""
    import torch  # slow, and the commands of this package get along without it

    with one_sample("array cannot be read"):
        return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
