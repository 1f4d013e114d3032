"""Images that come with a request. Nothing here imports torch."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from umm_zoo.errors import UserError
from umm_zoo.generation.images import read_image
from umm_zoo.serve.limits import Limits

if TYPE_CHECKING:
    from PIL import Image

#: PIL's names of the formats that are read: plain images alone, and nothing that starts another program, as EPS does.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


class Images:
    """Images of one request, opened one by one under its limits.

    Args:
        limits: of the server.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.opened: list[Image.Image] = []

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(3 * image.width * image.height for image in self.opened)

    def from_url(self, url: object, where: str) -> Image.Image:
        """The image of a data URL.

        Raises:
            UserError: it is none, or an address that this server would have to fetch.
        """
        expected = "a data URL such as data:image/png;base64,iVBORw0…"
        if not isinstance(url, str):
            raise UserError(where, f"a {type(url).__name__}", expected)
        start, comma, rest = url.partition(",")
        if not start.lower().startswith("data:") or not comma:
            scheme = url.partition(":")[0].lower() if ":" in url[:20] else ""
            found = f"an address ({scheme}:…)" if scheme else "a text that is none"
            raise UserError(where, found, expected, "this server fetches nothing from elsewhere")
        if not start.lower().endswith(";base64"):
            raise UserError(where, f"'{start[:40]}'", expected)
        try:
            coded = unquote_to_bytes(rest) if "%" in rest else rest.encode("ascii")
            content = base64.b64decode(b"".join(coded.split()), validate=True)
        except (binascii.Error, UnicodeEncodeError) as error:
            raise UserError(where, f"no base64 ({error})", expected) from None
        return self.from_bytes(content, where)

    def from_bytes(self, content: bytes, where: str) -> Image.Image:
        """The image of a file's bytes; a ``UserError`` where there is none, or too large a one, or one too many."""
        if len(self.opened) == self.limits.max_images:
            raise UserError(where, f"more than {self.limits.max_images} images", "fewer (--max-images)")
        room = self.limits.max_memory * 2**20 - self.num_bytes
        image = read_image(content, where, min(self.limits.max_pixels, room // 3), FORMATS)
        self.opened.append(image)
        return image
