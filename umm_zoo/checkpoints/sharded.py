"""Sharded checkpoints: the slices of every rank as safetensors, everything else in one plain file, and checksums over all.

Torch's default format keeps its metadata as a pickle; its safetensors format keeps it in the headers of the files, and that is what
stands here. So nothing has to be trusted to be read, and any number of ranks reads only the slices it needs. ``rest.pt`` is the
checkpoint with an empty tensor on the device ``meta`` in the place of each sharded one.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_map_with_path

from umm_zoo.checkpoints.folder import INDEX, PARTIAL, damage, index_checksum, remove, sync
from umm_zoo.checkpoints.output import in_memory, reason, write
from umm_zoo.errors import UserError

REST = "rest.pt"
#: Types of numbers as safetensors files name them.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_DTYPES |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
#: Bytes of one piece of a copy: what torch takes of page-locked memory is a power of two, and small pieces are not given back.
_PIECE = 1 << 26


def copied(checkpoint: dict[str, Any], path: Path, group: dist.ProcessGroup) -> Callable[[Callable[[], None]], None]:
    """Copy this rank's part of a checkpoint in memory; all ranks call it together.

    Args:
        checkpoint: the same on every rank but for the slices.
        path: the folder to be.
        group: through which the ranks agree, by nothing else than this: gloo, for it is used while training goes on.

    Returns:
        what writes the copies, on every rank, and calls its argument on rank 0 once the folder stands; it raises a ``UserError`` on
        every rank where one could not write.

    Raises:
        UserError: on every rank, where one could not copy.
    """
    is_main, partial = dist.get_rank(group) == 0, path.with_name(path.name + PARTIAL)
    rest, slices, name = memoryview(b""), list[memoryview](), _name(dist.get_rank(group))

    def copy() -> None:
        nonlocal rest, slices
        if is_main:
            remove(partial)
            partial.mkdir(parents=True)
        others, own = _take_out(checkpoint)
        rest, slices = in_memory(others) if is_main else rest, _as_safetensors(own) if own else []

    def write_slices() -> dict[str, Any]:
        if slices:
            write(slices, partial / name)
        return {name: _entry(slices)} if slices else {}

    def write_copy(then: Callable[[], None]) -> None:
        def complete() -> None:
            if is_main:
                write_rest(rest, partial, {name: entry for files in entries for name, entry in files.items()})
                remove(path)
                os.replace(partial, path)
                sync(path.parent)
                then()

        entries = _together(write_slices, path, group)
        _together(complete, path, group)

    _together(copy, path, group)
    return write_copy


def _together(act: Callable[[], Any], path: Path, group: dist.ProcessGroup) -> list[Any]:
    """What the same has given on every rank; a ``UserError`` on all where it failed on one, and nothing half written is left."""
    mine: tuple[str | None, Any]
    try:
        mine = (None, act())
    except Exception as error:
        mine = (reason(error), None)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    if problem := next((problem for problem, _ in found if problem), None):
        if dist.get_rank(group) == 0:
            remove(path.with_name(path.name + PARTIAL))
        raise UserError("checkpoint", f"{path} could not be written: {problem}")
    return [given for _, given in found]


def _take_out(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """The checkpoint with an empty tensor in the place of each sharded one, and those by their paths."""
    slices: dict[str, DTensor] = {}
    places: dict[Any, Tensor] = {}

    def take_out(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        memory = leaf.to_local().untyped_storage().data_ptr()  # there, padding, also where this rank's slice is empty
        tied = (memory, leaf.to_local().storage_offset(), leaf.shape) if memory else path  # tied weights are written once
        if tied not in places:
            places[tied] = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
            slices[keystr(path)] = leaf
        return places[tied]

    return tree_map_with_path(take_out, checkpoint), slices


def _name(rank: int) -> str:
    """As torch names the file of a rank."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def _as_safetensors(slices: Mapping[str, DTensor]) -> list[memoryview]:
    """This rank's slices as a safetensors file with the header of torch's distributed checkpoints, in pieces, copied once."""
    header, offsets, tensors, first = dict[str, Any](), dict[str, Any](), list[Tensor](), 0
    for name in sorted(slices, key=lambda name: (-slices[name].element_size(), name)):  # so that each lies at a multiple of its own
        local = slices[name].to_local().detach()
        tensors.append(local.contiguous().view(-1).view(torch.uint8))
        (chunk,) = slices[name].__create_chunk_list__()
        offsets[name] = {"saved_offsets": list(chunk.offsets)}
        last = first + len(tensors[-1])
        header[name] = {"dtype": _DTYPES[local.dtype], "shape": list(local.shape), "data_offsets": [first, last]}
        first = last
    said = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    text = json.dumps({"__metadata__": said, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *(piece.numpy().data for piece in _copies(tensors))]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bytes one behind the other on the CPU, in pieces; page-locked where they come from a GPU, so that all are copied at once."""
    total, on_gpu = sum(map(len, tensors)), any(tensor.is_cuda for tensor in tensors)
    pieces = [torch.empty(min(_PIECE, total - first), dtype=torch.uint8, pin_memory=on_gpu) for first in range(0, total, _PIECE)]
    place = 0
    for tensor in tensors:
        while len(tensor):
            room = pieces[place // _PIECE][place % _PIECE :]
            size = min(len(room), len(tensor))
            room[:size].copy_(tensor[:size], non_blocking=True)
            place, tensor = place + size, tensor[size:]
    if on_gpu:  # not run on a GPU yet
        torch.cuda.current_stream().synchronize()
    return pieces


def write_rest(rest: memoryview, folder: Path, files: dict[str, Any]) -> None:
    """Write everything else, and the index; a ``ValueError`` where a file is not what its rank wrote."""
    write([rest], folder / REST)
    index: dict[str, Any] = {"format": 2, "files": {**files, REST: _entry([rest])}}
    index["crc32"] = index_checksum(index)
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with (folder / INDEX).open("rb") as stream:
        os.fsync(stream.fileno())
    sync(folder)
    if problem := damage(folder):
        raise ValueError(problem)


def _entry(contents: Sequence[memoryview]) -> dict[str, Any]:
    value = 0
    for content in contents:
        value = zlib.crc32(content, value)
    return {"size": sum(len(content) for content in contents), "crc32": value}


def read_rest(folder: Path) -> dict[str, Any]:
    """The checkpoint with an empty tensor on ``meta`` in the place of each sharded one."""
    if json.loads((folder / INDEX).read_text(encoding="utf-8")).get("format") != 2:
        found = "a sharded checkpoint of an earlier version"
        raise ValueError(f"{folder}: found {found}, expected a file made of it there (consolidate)")
    rest: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return rest


def read_sharded(folder: Path, empty: Callable[[Tensor], Tensor] = lambda tensor: torch.empty_like(tensor, device="cpu")) -> Any:
    """The checkpoint as one process would have written it, or in slices.

    ``empty`` makes the tensor to read into, of a tensor on ``meta``; of a sharded one only the local part is read.
    """
    read: dict[str, Tensor] = {}
    places: dict[int, Tensor] = {}

    def put_back(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_meta:
            return leaf
        if id(leaf) not in places:
            places[id(leaf)] = read[keystr(path)] = empty(leaf)
        return places[id(leaf)]

    rest = read_rest(folder)
    checkpoint = tree_map_with_path(put_back, rest)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
        dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return checkpoint
