"""What stands beside the pixels of an image file: damage there refuses no sound image, wherever a file is opened."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

#: Chunks of a PNG about its pixels, or about which side is up; over others, such as long texts, PIL refuses sound images.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Turns that make the width the height.
SWAPS = tuple(turn for number, turn in _UPRIGHT.items() if number >= 5)


def pixels_only(content: bytes) -> bytes:
    """A PNG without its texts, colour profiles, damaged EXIF blocks and the like; other formats as they are.

    Which side is up comes before the pixels, where it is read without them.
    """
    if not content.startswith(_PNG_START):
        return content
    kept, place = [_PNG_START], len(_PNG_START)
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + length + 12]
        if kind in _PNG_CHUNKS and (kind != b"eXIf" or chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))):
            kept.insert(2 if kind == b"eXIf" else len(kept), chunk)
        place += length + 12
    return b"".join(kept)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The turn that puts an image upright once it has been loaded; None where it is, or a damaged EXIF block does not say."""
    if "exif" not in image.info and image.format != "TIFF":
        return None
    try:
        return _UPRIGHT.get(int(image.getexif().get(_ORIENTATION, 1)))
    except Exception:
        return None
