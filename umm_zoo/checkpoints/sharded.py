"""Sharded checkpoints: torch's distributed checkpoint as safetensors, everything else in one plain file, and checksums over all.

Torch's default format keeps its metadata as a pickle; its safetensors format keeps it in the headers of the files. So nothing has
to be trusted to be read, and any number of ranks reads only the slices it needs. ``rest.pt`` is the checkpoint with an empty
tensor on the device ``meta`` in the place of each sharded one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_map_with_path

from umm_zoo.checkpoints.folder import INDEX, checksum, damage, index_checksum, sync
from umm_zoo.checkpoints.output import in_memory, write

REST = "rest.pt"


def write_slices(checkpoint: dict[str, Any], folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write this rank's slices; all ranks call it together, and where one fails it raises on every rank.

    Returns:
        the rest of the checkpoint, and the entries of this rank's files in the index.
    """
    slices: dict[str, Tensor] = {}
    places: dict[Any, Tensor] = {}

    def take_out(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        memory = leaf.to_local().untyped_storage().data_ptr()  # there, padding, also where this rank's slice is empty
        tied = (memory, leaf.to_local().storage_offset(), leaf.shape) if memory else path  # tied weights are written once
        if tied not in places:
            places[tied] = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
            slices[keystr(path)] = leaf.detach()
        return places[tied]

    rest = tree_map_with_path(take_out, checkpoint)
    try:
        dcp.save(slices, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as error:  # over what each rank has met
        raise next(iter(error.failures.values()))[0] from error
    own = folder.glob(f"shard-{rank + 1:05d}-*")  # torch's names
    return rest, {file.name: _entry(file) for file in own}


def write_rest(rest: dict[str, Any], folder: Path, files: dict[str, Any]) -> None:
    """Write everything else, and the index; a ``ValueError`` where a file is not what its rank wrote."""
    write(in_memory(rest), folder / REST)
    index: dict[str, Any] = {"format": 2, "files": {**files, REST: _entry(folder / REST)}}
    index["crc32"] = index_checksum(index)
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with (folder / INDEX).open("rb") as stream:
        os.fsync(stream.fileno())
    sync(folder)
    if problem := damage(folder):
        raise ValueError(problem)


def _entry(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "crc32": checksum(file)}


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
