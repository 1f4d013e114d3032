"""Checksums of whole files of weights, inside the file: nothing in them can change unseen. Nothing here imports torch.

An archive of ``torch.save`` has a checksum per entry, which leaves its headers open; its seal is the archive's comment. A
safetensors file has none at all; its seal stands among the metadata of its header. Readers of both formats pass over a seal.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from pathlib import Path

#: Seal of an archive; the archive's last two bytes before it say how long it is.
_COMMENT = "umm_zoo crc32 {:08x}"
_LENGTH = len(_COMMENT.format(0))
#: Key of the seal of a safetensors file, and what stands there before the file is sealed.
KEY, OPEN = "crc32", "0" * 8
_ENTRY = re.compile(rb'"crc32":\s*"([0-9a-f]{8})"')
_BLOCK = 1 << 22


def seal(path: Path) -> None:
    """Write the checksum of a file into it, and flush it to the disk: a ``.safetensors`` with ``KEY: OPEN``, else an archive."""
    with path.open("r+b") as stream:
        if path.name.removesuffix(".partial").endswith(".safetensors"):
            found = _find_entry(path)
            if found is None:
                raise ValueError(f"{path}: found no '{KEY}' among its metadata, expected '{OPEN}'")
            stream.seek(found[0])
            stream.write(f"{_sum_without(path, found[0], found[0] + 8):08x}".encode())
        else:
            end = stream.seek(0, os.SEEK_END)
            text = _COMMENT.format(_sum_without(path, end - 2, end))
            stream.seek(end - 2)
            stream.write(_LENGTH.to_bytes(2, "little") + text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def damage_of_archive(path: Path) -> str | None:
    """The fault of what ``torch.save`` has written, None where every byte is what was written."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(0, size - _LENGTH - 2))
        tail = stream.read()
    sealed = re.fullmatch(rb"umm_zoo crc32 ([0-9a-f]{8})", tail[2:])
    if sealed:
        end = size - _LENGTH
        if int(sealed[1], 16) == _sum_without(path, end - 2, end, end) and int.from_bytes(tail[:2], "little") == _LENGTH:
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except zipfile.BadZipFile:
        return "empty" if size == 0 else "cut short"
    if bad:
        return f"'{bad}' is not what was written"
    return "its table of contents is not what was written" if sealed else None  # an earlier version did not seal


def damage_of_safetensors(path: Path) -> str | None:
    """The fault of consolidated weights, None where every byte is what was written, or they were never sealed."""
    if path.stat().st_size == 0:
        return "empty"
    found = _find_entry(path)
    if found is None:
        return None
    place, value = found
    return None if value == OPEN or int(value, 16) == _sum_without(path, place, place + 8) else "it is not what was written"


def _find_entry(path: Path) -> tuple[int, str] | None:
    """Where the checksum stands in a safetensors file, and what it says."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        head = stream.read(min(length, path.stat().st_size))
    match = _ENTRY.search(head)
    return (8 + match.start(1), match[1].decode()) if match else None


def _sum_without(path: Path, first: int, last: int, end: int | None = None) -> int:
    """CRC-32 of a file up to ``end``, the bytes from ``first`` to ``last`` being zeros."""
    value, position = 0, 0
    with path.open("rb") as stream:
        while block := bytearray(stream.read(_BLOCK if end is None else min(_BLOCK, end - position))):
            for number in range(max(first, position), min(last, position + len(block))):
                block[number - position] = 0
            value, position = zlib.crc32(block, value), position + len(block)
    return value
