"""The files of a sharded checkpoint: each rank's pieces as safetensors, everything else in one plain file, an index over all.

Torch's own sharded format keeps pickled objects; here nothing has to be trusted to be read, and another number of ranks reads only
the parts it needs. ``index.json`` has ``tensors`` (by key: shape, dtype, and the pieces with their file and offset) and ``files``
(size and checksum of each).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from umm_zoo.checkpoints.folder import INDEX, checksum, damage, sync

#: Where a sharded tensor was taken out, its key stands under this one.
MARK = "__sharded__"
REST = "rest.pt"


@dataclass(frozen=True)
class Piece:
    """One rank's part of a tensor.

    Args:
        shape: of the whole tensor.
        offset: where the part begins in it.
        dtype: torch's name of the type.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    dtype: str


def local_box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, offset) of this rank's part of a sharded tensor."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def take_out(tree: Any, pieces: dict[str, tuple[Piece, Tensor]]) -> Any:
    """``tree`` with every sharded tensor replaced by a mark, and the local parts put into ``pieces``."""
    return _take_out(tree, pieces, "", {})


def _take_out(tree: Any, pieces: dict[str, tuple[Piece, Tensor]], key: str, seen: dict[tuple[int, tuple[int, ...]], str]) -> Any:
    if isinstance(tree, DTensor):
        shape, offset = local_box(tree)
        local = tree.to_local().detach()
        if local.numel():  # tied weights stand under two names and are written once
            first = seen.setdefault((local.data_ptr(), shape), key)
            if first != key:
                return {MARK: first}
        dtype = str(tree.dtype).removeprefix("torch.")
        # a strided or padded part is written as what it is: the elements of its box
        pieces[key] = (Piece(tuple(tree.shape), offset, dtype), local.reshape(shape).cpu().contiguous())
        return {MARK: key}
    if isinstance(tree, dict):
        return {name: _take_out(value, pieces, f"{key}/{name}" if key else str(name), seen) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        return type(tree)(_take_out(value, pieces, f"{key}/{number}", seen) for number, value in enumerate(tree))
    return tree


def write_pieces(folder: Path, rank: int, pieces: dict[str, tuple[Piece, Tensor]]) -> tuple[str, dict[str, Any]]:
    """Write one rank's file; returns its name and its entry in ``files``."""
    name = f"rank-{rank:05d}.safetensors"
    save_file({key: tensor for key, (_, tensor) in pieces.items() if tensor.numel()}, folder / name)
    _flush(folder / name)
    return name, {"size": (folder / name).stat().st_size, "crc32": checksum(folder / name)}


def write_rest(folder: Path, rest: Any, written: Sequence[tuple[str, dict[str, Any], dict[str, Piece]]]) -> None:
    """Write everything else, and the index, over what each rank has ``written``: file, entry, pieces.

    Raises:
        ValueError: the pieces do not make up the tensors, or a file is not what its rank wrote.
    """
    torch.save(rest, folder / REST)
    _flush(folder / REST)
    files = {name: entry for name, entry, _ in written}
    files[REST] = {"size": (folder / REST).stat().st_size, "crc32": checksum(folder / REST)}
    tensors: dict[str, dict[str, Any]] = {}
    marked: set[str] = set()
    put_back(rest, marked.add)
    for name, _, pieces in written:
        for key, piece in pieces.items():
            if key not in marked:  # a tied weight of which this rank has no element
                continue
            entry = tensors.setdefault(key, {"shape": list(piece.shape), "dtype": piece.dtype, "pieces": []})
            if list(piece.offset) not in [offset for _, offset in entry["pieces"]]:  # replicas hold the same part
                entry["pieces"].append([name, list(piece.offset)])
    (folder / INDEX).write_text(json.dumps({"format": 1, "files": files, "tensors": tensors}), encoding="utf-8")
    _flush(folder / INDEX)
    sync(folder)
    if problem := damage(folder):
        raise ValueError(problem)
    checkpoint = ShardedCheckpoint(folder)
    for key in tensors:
        checkpoint.tensor(key).check()


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


class SavedTensor:
    """A tensor of a sharded checkpoint, of which any box can be read.

    Args:
        folder: the checkpoint.
        key: its name in the files.
        entry: its entry in the index.
    """

    def __init__(self, folder: Path, key: str, entry: dict[str, Any]) -> None:
        self.folder, self.key, self.pieces = folder, key, entry["pieces"]
        self.shape = tuple(entry["shape"])
        self.dtype: torch.dtype = getattr(torch, entry["dtype"])

    def check(self) -> None:
        """Raise ValueError unless the pieces fill the tensor exactly."""
        elements = 0
        for name, _ in self.pieces:
            with safe_open(str(self.folder / name), framework="pt") as file:
                if self.key in file.keys():  # noqa: SIM118 - not a dict; an empty part is not written
                    elements += torch.Size(file.get_slice(self.key).get_shape()).numel()
        if elements != torch.Size(self.shape).numel():
            raise ValueError(f"tensor '{self.key}' of shape {list(self.shape)} has {elements} elements on disk")

    def box(self, shape: Sequence[int], offset: Sequence[int]) -> Tensor:
        """The part of a given shape that begins at a given place."""
        result = torch.empty(tuple(shape), dtype=self.dtype)
        for name, start in self.pieces:
            with safe_open(str(self.folder / name), framework="pt") as file:
                if self.key not in file.keys():  # noqa: SIM118
                    continue
                saved = file.get_slice(self.key)
                first = [max(a, b) for a, b in zip(start, offset, strict=True)]
                ends = zip(start, saved.get_shape(), offset, shape, strict=True)
                last = [min(a + b, c + d) for a, b, c, d in ends]
                if any(a >= b for a, b in zip(first, last, strict=True)):
                    continue
                source = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True))
                target = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, offset, strict=True))
                result[target] = saved[source] if source else file.get_tensor(self.key)
        return result

    def full(self) -> Tensor:
        """All of it."""
        return self.box(self.shape, (0,) * len(self.shape))


class ShardedCheckpoint:
    """A sharded checkpoint on disk.

    Args:
        folder: with ``index.json``.

    Raises:
        FileNotFoundError: there is no index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["tensors"]

    def tensor(self, key: str) -> SavedTensor:
        """One of the sharded tensors."""
        return SavedTensor(self.folder, key, self._tensors[key])

    def rest(self) -> dict[str, Any]:
        """Everything that is not sharded, with a mark for each tensor that is."""
        rest: dict[str, Any] = torch.load(self.folder / REST, map_location="cpu", weights_only=True)
        return rest

    def lazy(self) -> dict[str, Any]:
        """The checkpoint with a ``SavedTensor`` in the place of each sharded tensor."""
        return {key: put_back(value, self.tensor) for key, value in self.rest().items()}

    def whole(self) -> dict[str, Any]:
        """The checkpoint as one process would have written it."""
        return {key: put_back(value, lambda name: self.tensor(name).full()) for key, value in self.rest().items()}


def put_back(tree: Any, tensor: Callable[[str], Any]) -> Any:
    """The inverse of ``take_out``."""
    if isinstance(tree, dict):
        if tree.keys() == {MARK}:
            return tensor(tree[MARK])
        return {name: put_back(value, tensor) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(put_back(value, tensor) for value in tree)
    return tree


def box_of(value: SavedTensor | Tensor, shape: Sequence[int], offset: Sequence[int]) -> Tensor:
    """A box of a tensor, on disk or in memory."""
    if isinstance(value, SavedTensor):
        return value.box(shape, offset)
    return value[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


__all__ = ["Piece", "SavedTensor", "ShardedCheckpoint", "box_of", "local_box", "put_back", "take_out", "write_pieces", "write_rest"]
