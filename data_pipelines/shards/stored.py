"""Outputs of frozen parts stored beside the shards.

``FOLDER/precomputed/NAME-HASH/SHARD-CONTENT-000000.tar`` holds, for every usable sample of ``FOLDER/SHARD.tar``, the member
``KEY.NAME.npy``, in WebDataset's plain layout with an index beside it. HASH is of weights, settings and transform, CONTENT of the
tar itself. The originals stay untouched.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from torch import Tensor

from data_pipelines.decoding import BadSampleError, decode_array
from data_pipelines.shards.addresses import is_remote
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.index import ShardIndex, load_index
from umm_zoo.errors import MistakeError

FOLDER = "precomputed"
_KEPT_NUMBERS = 64
_HOW = "`python -m data_pipelines.precompute EXPERIMENT --only {}`"


def base_folder(shard: str, where: str | None) -> Path:
    """The folder of the stored outputs of a shard.

    Args:
        shard: path or address.
        where: a folder of the user's choice; None is beside the shard.

    Raises:
        MistakeError: beside a remote shard nothing can be written.
    """
    if where is not None:
        return Path(where)
    if is_remote(shard):
        raise MistakeError(f"{shard}: found a remote shard, beside which nothing can be stored; expected data.precomputed=FOLDER")
    return Path(os.path.dirname(os.path.abspath(shard))) / FOLDER


def folder_of(base: Path, name: str, fingerprint: str) -> Path:
    """Where outputs of one name and fingerprint lie."""
    return base / f"{name}-{fingerprint[:16]}"


def stem_of(index: ShardIndex) -> str:
    """The first part of the file name of what was stored for a shard."""
    return f"{PurePosixPath(index.path).stem}-{index.sha256[:8]}"


class StoredOutputs:
    """What was stored under one name for some shards.

    Args:
        name: of the output.
        places: the tar of stored outputs by the path of the shard.
    """

    def __init__(self, name: str, places: dict[str, Path]) -> None:
        self.name = name
        self.sides = {shard: load_index(str(place)) for shard, place in places.items()}
        self._numbers: OrderedDict[str, dict[str, int]] = OrderedDict()

    def read(self, files: RangeReader, index: ShardIndex, number: int) -> dict[str, Tensor]:
        """The entries of a sample, by the name in ``Batch.extras``; the first dimension counts entries.

        Raises:
            BadSampleError: nothing was stored for this sample.
        """
        side, key = self.sides[index.path], index.key(number)
        if len(side) != len(index) or side.key(number) != key:
            numbers = self._numbers_of(side)
            if key not in numbers:
                raise BadSampleError(f"no stored '{self.name}' for this sample, which could not be used when they were made")
            number = numbers[key]
        members = files.members(side, number)
        return {name.removesuffix(".npy"): decode_array(content) for name, content in members.items() if name.endswith(".npy")}

    def _numbers_of(self, side: ShardIndex) -> dict[str, int]:
        if side.path not in self._numbers:
            self._numbers[side.path] = {key: number for number, key in enumerate(side.keys())}
            while len(self._numbers) > _KEPT_NUMBERS:
                self._numbers.popitem(last=False)
        return self._numbers[side.path]


def any_stored(name: str, indexes: Sequence[ShardIndex], where: str | None) -> bool:
    """Whether anything of that name was stored for any of the shards, so that weights need hashing only where it was."""
    local = [index.path for index in indexes if where is not None or not is_remote(index.path)]
    return any(next(base.glob(f"{name}-*"), None) for base in {base_folder(path, where) for path in local})


def find_stored(name: str, fingerprint: str, indexes: Sequence[ShardIndex], where: str | None) -> StoredOutputs | None:
    """The stored outputs of some shards; None where nothing of that name was ever stored for any of them.

    Raises:
        MistakeError: they were made with other weights or another transform, or for a part of the shards only.
    """
    if where is None and any(is_remote(index.path) for index in indexes):
        return None  # beside a remote shard nothing can have been written
    bases = sorted({base_folder(index.path, where) for index in indexes})
    found, missing = {}, []
    for index in indexes:
        folder = folder_of(base_folder(index.path, where), name, fingerprint)
        place = folder / f"{stem_of(index)}-000000.tar"
        if place.is_file():
            found[index.path] = place
        else:
            missing.append(index.path)
    off = "data.precomputed=ignore computes them in training instead"
    if not missing:
        return StoredOutputs(name, found)
    if any(folder_of(base, name, fingerprint).is_dir() for base in bases):
        raise MistakeError(
            f"data.precomputed: found stored '{name}' for {len(found)} of {len(indexes)} shards, not for {missing[0]}; "
            f"{_HOW.format(name)} makes the rest, {off}"
        )
    others = [folder for base in bases for folder in base.glob(f"{name}-*") if folder.is_dir()]
    if others:
        raise MistakeError(
            f"data.precomputed: found stored '{name}' of other weights or another transform ({others[0]}), expected "
            f"{fingerprint[:16]}; {_HOW.format(name)} makes them anew, {off}"
        )
    return None
