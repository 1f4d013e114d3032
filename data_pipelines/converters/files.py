"""Images for shards: found valid and kept byte for byte, or shrunk."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from data_pipelines.decoding import BadSampleError, decoded, open_image
from data_pipelines.tasks import IMAGE_TYPES

#: How members of these formats are called; images of other formats are stored as PNG.
_KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
_SYSTEM = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
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
            kept = scale >= 1 and image.format in _KINDS
            upright = decoded(image, (1, 1) if kept else None)  # the whole stream is read in any case
            if kept:
                return _KINDS[str(image.format)], content
            if scale < 1:
                width, height = (max(1, round(length * scale)) for length in upright.size)
                upright = upright.resize((width, height), Image.Resampling.BICUBIC)
    except BadSampleError as error:
        raise BadSampleError(f"damaged image: {name}{': ' if name else ''}{error}") from error
    lossless = scale >= 1 or max(upright.size) <= _LOSSLESS
    file = io.BytesIO()
    upright.save(file, "PNG" if lossless else "JPEG", quality=_JPEG_QUALITY)
    return "png" if lossless else "jpg", file.getvalue()


@dataclass
class Substitutes:
    """Images of another suffix than the one named, for lists name downloads before their type is known.

    ``is_named`` says whether a name is another row's, whose image is not taken; ``repairs`` say what was taken.
    """

    is_named: Callable[[str], bool]
    repairs: list[str] = field(default_factory=list)

    def find(self, path: Path, name: str, folder: Path) -> Path:
        """The only such image in place of a missing file, or its path again; a ``BadSampleError`` where it may not be meant.

        One whose name differs in case alone, as systems write that do not tell it, is looked for as well.
        """
        suffixes = [suffix for kind in IMAGE_TYPES for suffix in (f".{kind}", f".{kind.upper()}")]
        others = [other for suffix in suffixes if (other := path.with_suffix(suffix)).is_file()]
        named = [other.name for other in others if self.is_named(PurePosixPath(name).with_suffix(other.suffix).as_posix())]
        what = "image of another suffix taken than the one named"
        if not others:
            others, what = spelled_otherwise(path, folder), "image taken whose name differs in upper and lower case"
        if not others:
            return path
        if named or len(others) > 1:
            found = f"{named[0]} is another row's" if named else f"there are {', '.join(other.name for other in others)}"
            raise BadSampleError(f"missing image: {name}; {found}")
        self.repairs.append(what)
        return others[0]


def spelled_otherwise(path: Path, folder: Path) -> list[Path]:
    """The files below ``folder`` whose path is that of ``path`` but for upper and lower case."""
    found = [folder]
    for part in path.relative_to(folder).parts:
        found = [place / name for place in found for name in _names_in(place).get(part.casefold(), ())]
    return [place for place in found if place.is_file()]


@lru_cache(64)
def _names_in(folder: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    with suppress(OSError):
        for name in sorted(os.listdir(folder)):
            names.setdefault(name.casefold(), []).append(name)
    return names


def read_image(
    folder: Path, name: object, size: int | None = None, edge: Edge = max, substitutes: Substitutes | None = None
) -> tuple[str, bytes]:
    """`stored_image` of a file inside ``folder``, or of one of the ``substitutes`` where it is missing."""
    path = inside(folder, name)
    try:
        if not path.is_file():  # written as the other of two normal forms of one name, as macOS does
            names = (unicodedata.normalize(form, str(path.relative_to(folder))) for form in ("NFC", "NFD"))
            path = next((other for other in map(folder.joinpath, names) if other.is_file()), path)
        if substitutes and path.name and not path.is_file():
            path = substitutes.find(path, str(name), folder)
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise BadSampleError(f"missing image: {name}") from None
    except OSError as error:
        raise BadSampleError(f"unreadable image: {str(name)[:200]} ({error.strerror})") from error
    return stored_image(content, size, edge, str(name))


def is_hidden(name: str) -> bool:
    """Whether a path leads to a hidden file, or into a folder that systems add of their own (``__MACOSX``, ``@eaDir`` …)."""
    return any(part in _SYSTEM or (part.startswith(".") and part.strip(".")) for part in PurePosixPath(name).parts)


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
    images: Sequence[Any],
    target: Any = None,
    folder: Path | None = None,
    size: int | None = None,
    edge: Edge = max,
    substitutes: Substitutes | None = None,
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
            kind, content = read_image(folder, path, size, edge, substitutes)
        members[f"{name}.{kind}"] = content
    return members
