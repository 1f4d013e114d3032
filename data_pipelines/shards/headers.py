"""Headers of tar archives as strangers write them: what is a member of which sample, and which members cannot be used."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from umm_zoo.backbones.weight_files import stands_for

BLOCK = 512
MAX_MEMBER = 1 << 28  # 256 MiB: no image or text is larger, and a header may claim anything
_NOT_UTF8 = "the name of a member is not UTF-8"
_LEAST_EXTENDED = 1 << 33  # sizes from 8 GiB on do not fit into a plain header
MAX_ARCHIVE = 1 << 42
_EXTENDED = (b"x", b"g", b"X", b"L", b"K")
_MAX_EXTENDED = 1 << 20  # tarfile reads them whole
_PARSERS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError)


class Member(NamedTuple):
    """Member of a tar by its headers.

    Args:
        key, extension: of the sample, both empty where the name belongs to none.
        name: as printable text.
        header: place and size.
        tar: to read it from.
        refused: why it cannot be used, empty where it can.
    """

    key: str
    extension: str
    name: str
    header: _Header
    tar: tarfile.TarFile
    refused: str


def split_member_name(name: str) -> tuple[str, str]:
    """``a/b.0.png`` -> ``("a/b", "0.png")``; an empty key where the name belongs to no sample."""
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension:
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()


def open_tar(file: Any, mode: str, limit: int = MAX_ARCHIVE) -> tarfile.TarFile:
    """An archive of ``limit`` bytes: a plain one (mode ``r:``), any (``r:*``), or any that is read from front to back (``r|*``).

    Raises:
        tarfile.TarError, OSError: it is no tar.
    """
    kind = type("_HeaderOfOneTar", (_Header,), {"damage": [], "seen": False, "limit": limit})
    with _parsing():
        return tarfile.open(fileobj=file, mode=mode, tarinfo=kind, ignore_zeros=True)  # type: ignore[call-overload]


def members_of(tar: Any) -> Iterator[Member | str]:
    """The members of what `open_tar` opened, without folders.

    A text in place of a member says what is damaged before the next one: Python's tarfile takes a damaged header for the end.
    Behind a header that states more than the archive holds, the next header is looked for.

    Raises:
        tarfile.TarError, OSError: it cannot be read on.
    """
    damage: list[str] = tar.tarinfo.damage
    with _parsing():
        for header in tar:
            tar.members.clear()  # tarfile keeps every header; a shard of a million members need not
            if damage:
                yield f"{len(damage)} blocks before {_printable(header.name)} are no header ({damage[0]})"
                damage.clear()
            if not header.isdir():
                yield _member(header, tar)
    if damage:
        yield f"{len(damage)} blocks at the end are no header ({damage[0]})"


@contextmanager
def _parsing() -> Iterator[None]:
    """Whatever the parsers of a hostile file raise, as a ``tarfile.ReadError``."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"its headers cannot be parsed ({type(error).__name__}: {str(error)[:80]})") from error


def _member(header: _Header, tar: Any) -> Member:
    name = _printable(header.name)
    key, extension = split_member_name(name) if header.isreg() and not header.issparse() else ("", "")
    refused = header.refused or ("" if name == header.name else _NOT_UTF8)
    if header.size > MAX_MEMBER:
        refused = f"member '{name[-80:]}' of {header.size} bytes, over the limit of {MAX_MEMBER}"
    return Member(key, extension, name, header, tar, refused if key else "")


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _Header(tarfile.TarInfo):
    """Header whose size is that of its plain form where an extended one contradicts it."""

    damage: list[str]
    seen: bool
    limit: int
    plain_size = 0
    refused = ""
    is_beyond = False  # it states more than the tar holds

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        """The next member; what is damaged in or behind an extended header costs no more than any other damaged header."""
        known = len(cls.damage)
        try:
            header: _Header = super().fromtarfile(tar)
        except (tarfile.SubsequentHeaderError, *_PARSERS) as error:  # type: ignore[attr-defined]
            if len(cls.damage) == known:
                cls.damage.append(str(error)[:80] or type(error).__name__)
            raise tarfile.InvalidHeaderError(str(error)) from error  # type: ignore[attr-defined]
        if tar.offset > cls.limit:
            header.refused = f"a header states {header.size} bytes, more than the tar holds"
            header.size, tar.offset, header.is_beyond = 0, header.offset_data, True
        return header

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """The header in a block; what is damaged is noted, and raised at the start of a file."""
        try:
            header: _Header = super().frombuf(buf, encoding, errors)
            if header.size > (_MAX_EXTENDED if header.type in _EXTENDED else MAX_ARCHIVE):
                raise tarfile.InvalidHeaderError(f"a size of {header.size} bytes")  # type: ignore[attr-defined]
        except tarfile.HeaderError as error:
            if bytes(buf).strip(b"\0"):
                if not cls.seen:
                    raise tarfile.ReadError(stands_for(bytes(buf)) or str(error)) from error
                cls.damage.append(str(error))
            raise
        cls.seen = True
        if header.size < 0:
            header.size, header.refused = 0, f"a header states {header.size} bytes"
        header.plain_size = header.size
        return header

    def _apply_pax_info(self, headers: dict[str, str], encoding: str, errors: str) -> None:
        super()._apply_pax_info(headers, encoding, errors)  # type: ignore[misc]
        if "size" in headers and self.size != self.plain_size and self.size < _LEAST_EXTENDED:
            self.refused = f"its headers state {self.plain_size} and {headers['size'][:20]} bytes"
            self.size = self.plain_size


def stated(blocks: bytes) -> tuple[str, int]:
    """Name and size that the last block of ``blocks`` states as a header, with the extended headers right before it."""
    start = len(blocks) - BLOCK
    for place in range(start - 2 * BLOCK, -1, -BLOCK):  # an extended header is one block and at least one of content
        if blocks[place + 156 : place + 157] in _EXTENDED:
            content = max(1, -(-plain_size(blocks[place : place + BLOCK]) // BLOCK))
            start = place if place + (1 + content) * BLOCK == start else start
    try:
        file = io.BytesIO(blocks[start:] + bytes(BLOCK))
        with open_tar(file, "r:") as tar:
            header = tar.next()
            return ("", -1) if header is None else (_printable(header.name), header.size)
    except Exception:  # as in members_of
        return "", -1


def plain_size(header: bytes) -> int:
    """The size field of a plain header (octal digits, or base 256 for members over 8 GiB); -1 where there is none."""
    field = header[124:136]
    if len(field) == 12 and field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 "), 8)
    except ValueError:
        return -1
