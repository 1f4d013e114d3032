"""A picture on its way into a shard: found valid and kept byte for byte, or shrunk."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from data_pipelines.decoding import MAX_PIXELS, BadSampleError, open_picture, to_rgb
from data_pipelines.tasks import PICTURE_TYPES

#: How members of these formats are called; pictures of other formats are stored as PNG.
_KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
#: Up to this edge a shrunken picture is stored without loss; above, JPEG saves nine tenths of the space.
_LOSSLESS = 128
_JPEG_QUALITY = 95


def stored_picture(content: bytes, size: int | None = None, edge: Callable[[Iterable[int]], int] = max) -> tuple[str, bytes]:
    """File type and bytes to store: ``content`` itself, or the picture shrunk until its ``edge`` is ``size`` (never enlarged).

    All of the picture is decoded, so that a damaged file is found now and not in the training.

    Args:
        content: untrusted bytes.
        size: None keeps every picture as it is.
        edge: ``max`` measures the long edge, ``min`` the short one.

    Raises:
        BadSampleError: the bytes are no picture that a loader would accept.
    """
    with open_picture(content, MAX_PIXELS) as picture:
        scale = 1.0 if size is None else size / edge(picture.size)
        if scale >= 1 and picture.format in _KINDS:
            if picture.format == "JPEG":  # an eighth of the resolution: the whole stream is still read, in a fraction of the time
                picture.draft(None, (1, 1))
            kind = _KINDS[picture.format]
            picture.load()
            return kind, content
        picture.load()
        upright = to_rgb(picture)
        if scale < 1:
            width, height = (max(1, round(length * scale)) for length in upright.size)
            upright = upright.resize((width, height), Image.Resampling.BICUBIC)
    lossless = scale >= 1 or max(upright.size) <= _LOSSLESS
    file = io.BytesIO()
    upright.save(file, "PNG" if lossless else "JPEG", quality=_JPEG_QUALITY)
    return "png" if lossless else "jpg", file.getvalue()


def read_picture(folder: Path, name: object, size: int | None = None) -> tuple[str, bytes]:
    """`stored_picture` of the file that a row names, inside ``folder`` and nowhere else.

    Where the file is missing but one with another picture suffix is there, that one is taken (the pictures of OCR-VQA are named
    ``.jpg`` in LLaVA's lists and come as ``.gif`` and ``.png`` too).

    Raises:
        BadSampleError: the name leads out of the folder, or the file is missing or damaged.
    """
    path = inside(folder, name)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        others = [path.with_suffix(f".{kind}") for kind in PICTURE_TYPES] if path.name else []
        other = next((candidate for candidate in others if candidate.is_file()), None)
        if other is None:
            raise BadSampleError(f"missing picture: {name}") from None
        content = other.read_bytes()
    except OSError as error:
        raise BadSampleError(f"unreadable picture: {name} ({error.strerror})") from error
    try:
        return stored_picture(content, size)
    except BadSampleError as error:
        raise BadSampleError(f"damaged picture: {name}: {error}") from error


def inside(folder: Path, name: object) -> Path:
    """The file called ``name`` under ``folder``; an absolute path counts when it begins with the folder's.

    Raises:
        BadSampleError: no usable name, or one that leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadSampleError(f"bad picture name: {name!r}"[:200])
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() and path.is_relative_to(folder.absolute().as_posix()):
        path = path.relative_to(folder.absolute().as_posix())
    if path.is_absolute() or ".." in path.parts:
        raise BadSampleError(f"picture outside of the folder: {name}"[:300])
    return folder / path


def picture_of(cell: Any, folder: Path | None, size: int | None = None) -> tuple[str, bytes]:
    """`stored_picture` of a cell as data sets write it: bytes, ``{"bytes": …, "path": …}``, or a name inside ``folder``.

    Raises:
        BadSampleError: the cell is empty or none of these, or its picture cannot be used.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes | bytearray):
        try:
            return stored_picture(bytes(content), size)
        except BadSampleError as error:
            raise BadSampleError(f"damaged picture: {error}") from error
    name = cell.get("path") if isinstance(cell, dict) else cell
    if not name:
        raise BadSampleError("missing picture: the cell is empty")
    if folder is None:
        raise BadSampleError(f"missing picture: only a name, {str(name)[:80]!r}, and no --images folder")
    return read_picture(folder, name, size)
