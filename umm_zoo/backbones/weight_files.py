"""Files of weights, looked at from outside: what is no weights, or only a part, is found before anything large is read."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

#: Files of the libraries: weights (of a variant such as fp16, in shards or not), and what says how they are read.
_WEIGHTS = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model)(?:\.(?P<variant>\w+?))?(?:-\d+-of-\d+)?(?:\.(?P<end>\w+))?\.(?P<type>safetensors|bin)"
)
_INDEX = re.compile(r".+\.(?:safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json")
_TEXTS = {"config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
_TEXTS |= {"vocab.json", "tokenizer.model", "spiece.model"}


def assert_readable(source: str | Path, variant: str | None = None) -> None:
    """Refuse a folder or a file in which something cannot be what its name says; a name on the hub is passed.

    Only files that would be read are looked at.

    Raises:
        ValueError: a Git-LFS pointer, a web page, an empty file, one cut short, a list of files that are not all there, or another
            variant than the one asked for.
    """
    path = Path(source)
    for file in _read_in(path, variant) if path.is_dir() else [path] if path.is_file() else []:
        if fault := damage_of(file):
            raise ValueError(f"{file}: found {fault}")


def stored_file(source: str | Path, subfolder: str | None = None, name: str = "config.json") -> dict[str, Any] | None:
    """A configuration of a local folder, which costs nothing to read; None where there is none, or the source is a name on the hub.

    Raises:
        ValueError: the file cannot be what its name says.
    """
    file = Path(source, subfolder or "", name)
    if not file.is_file():
        return None
    if fault := damage_of(file):
        raise ValueError(f"{file}: found {fault}")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _read_in(folder: Path, variant: str | None) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    weights: dict[str | None, list[Path]] = {}
    for file in files:
        if match := _WEIGHTS.fullmatch(file.name):
            weights.setdefault(match["variant"] or match["end"], []).append(file)
    if weights and variant not in weights:
        there = [name for name in weights if name]
        found = f"weights without a variant '{variant}'" if variant else f"weights of {' and '.join(map(repr, there))} alone"
        expected = f"variant: {there[0]}" if there else "no variant"
        raise ValueError(f"{folder}: found {found}, expected '{expected}' in the experiment")
    own = weights.get(variant, [])
    own = [file for file in own if file.suffix == ".safetensors"] or own
    lists = [file for file in files if (match := _INDEX.fullmatch(file.name)) and match["variant"] == variant]
    return [file for file in files if file.name in _TEXTS or file in own or (file in lists and len(own) != 1)]


def stands_for(head: bytes) -> str | None:
    """What a file is that stands for another one, weights or data, by its first bytes; None where it is none of these."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer, expected the file itself (run git lfs pull in that folder, or download it again)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, expected the file itself (download it again, with the right address and access)"
    return None


def damage_of(file: Path) -> str | None:
    """Fault of a file of weights, None where its frame is whole; tensors are not read."""
    size = file.stat().st_size
    if size == 0:
        return "an empty file, expected the whole one (download it again)"
    with file.open("rb") as stream:
        head = stream.read(512)
    if wrong := stands_for(head):
        return wrong
    if file.suffix == ".json":
        return _damage_of_json(file)
    if file.suffix == ".safetensors":
        return _damage_of_safetensors(file, size)
    if file.name.endswith((".bin", ".pt", ".pth")) and head.startswith(b"PK") and not zipfile.is_zipfile(file):
        return f"{size:,} bytes of an archive that is cut short, expected the whole file (download it again)"
    return None


def _damage_of_json(file: Path) -> str | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"no readable JSON ({error})"
    if not isinstance(content, dict):
        return "JSON that is no map"
    if file.name.endswith(".index.json") and isinstance(content.get("weight_map"), dict):
        missing = sorted({str(name) for name in content["weight_map"].values() if not (file.parent / str(name)).is_file()})
        if missing:
            return f"a list of files of which {len(missing)} are missing, such as '{missing[0]}' (download them too)"
    return None


def _damage_of_safetensors(file: Path, size: int) -> str | None:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            return (
                f"{size:,} bytes that are no safetensors file or the beginning of one, expected the whole file (download it again)"
            )
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return "a safetensors file with an unreadable header, expected the weights (download it again)"
    whole = 8 + length + max(ends, default=0)
    return None if whole == size else f"{size:,} bytes, expected {whole:,} as its header says (cut short? download it again)"
