"""Images for shards: found valid and kept byte for byte, or shrunk."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from data_pipelines.decoding import BadSampleError, open_image, to_rgb
from data_pipelines.tasks import IMAGE_TYPES

#: How members of these formats are called; images of other formats are stored as PNG.
_KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
#: Up to this edge a shrunken image is stored without loss; above, JPEG saves nine tenths of the space.
_LOSSLESS = 128
_JPEG_QUALITY = 95
#: Which edge a size is of: ``max`` measures the long one, ``min`` the short one.
Edge = Callable[[Iterable[int]], int]


def stored_image(content: bytes, size: int | None = None, edge: Edge = max, name: str = "") -> tuple[str, bytes]:
    """File type and bytes to store: ``content`` itself, or the image shrunk until its ``edge`` is ``size`` (never enlarged).

    All of the image is decoded, so that a damaged file, whose ``name`` the reason gives, is found now and not in the training.
    """
    try:
        with open_image(content) as image:
            scale = 1.0 if size is None else size / edge(image.size)
            if scale >= 1 and image.format in _KINDS:
                if image.format == "JPEG":  # an eighth of the resolution: the whole stream is still read, in a fraction of the time
                    image.draft(None, (1, 1))
                image.load()
                return _KINDS[image.format], content
            image.load()
            upright = to_rgb(image)
            if scale < 1:
                width, height = (max(1, round(length * scale)) for length in upright.size)
                upright = upright.resize((width, height), Image.Resampling.BICUBIC)
    except BadSampleError as error:
        raise BadSampleError(f"damaged image: {name}{': ' if name else ''}{error}") from error
    lossless = scale >= 1 or max(upright.size) <= _LOSSLESS
    file = io.BytesIO()
    upright.save(file, "PNG" if lossless else "JPEG", quality=_JPEG_QUALITY)
    return "png" if lossless else "jpg", file.getvalue()


def read_image(folder: Path, name: object, size: int | None = None, edge: Edge = max) -> tuple[str, bytes]:
    """`stored_image` of a file inside ``folder``; another suffix of an image is taken where the named one is missing."""
    path = inside(folder, name)
    try:
        if not path.is_file() and path.name:
            path = next((other for kind in IMAGE_TYPES if (other := path.with_suffix(f".{kind}")).is_file()), path)
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise BadSampleError(f"missing image: {name}") from None
    except OSError as error:
        raise BadSampleError(f"unreadable image: {name} ({error.strerror})") from error
    return stored_image(content, size, edge, str(name))


def inside(folder: Path, name: object) -> Path:
    """The file called ``name`` under ``folder``, and nowhere else; an absolute path counts when it begins with the folder's."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadSampleError(f"bad image name: {name!r}"[:200])
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() and path.is_relative_to(folder.absolute().as_posix()):
        path = path.relative_to(folder.absolute().as_posix())
    if path.is_absolute() or ".." in path.parts:
        raise BadSampleError(f"image outside of the folder: {name}"[:300])
    return folder / path


def image_members(
    images: Sequence[Any], target: Any = None, folder: Path | None = None, size: int | None = None, edge: Edge = max
) -> dict[str, bytes]:
    """Members ``0.png``, ``1.jpg`` … of input images, and ``target.png`` of the image to generate, where there is one.

    Cells are as data sets write them: bytes, ``{"bytes": …, "path": …}``, or a name inside ``folder`` (None: there may be none).
    """
    named = {**{str(place): cell for place, cell in enumerate(images)}, **({} if target is None else {"target": target})}
    members = {}
    for name, cell in named.items():
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if isinstance(content, bytes | bytearray):
            kind, content = stored_image(bytes(content), size, edge)
        elif path in (None, ""):
            raise BadSampleError("missing image: the cell is empty")
        elif folder is None:
            raise BadSampleError(f"missing image: only a name, {str(path)[:80]!r}, and no --images folder")
        else:
            kind, content = read_image(folder, path, size, edge)
        members[f"{name}.{kind}"] = content
    return members
