"""Outputs of frozen parts stored beside the shards.

``FOLDER/precomputed/NAME-HASH/SHARD-CONTENT-000000.tar`` holds, for every usable sample of ``FOLDER/SHARD.tar``, the member
``KEY.NAME.npy``, in WebDataset's plain layout with an index beside it. HASH is of weights, settings and transform, CONTENT of the
tar itself. The originals stay untouched.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from lightning import Trainer
from torch import Tensor

from data_pipelines.decoding import BadSampleError, decode_array
from data_pipelines.shards.addresses import is_remote, shown
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.index import ShardIndex, load_index
from data_pipelines.shards.sources import OpenSource
from data_pipelines.transforms.image_transform import ImageTransform
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.errors import UserError
from umm_zoo.method import Method

FOLDER = "precomputed"
_SEAL = b"crc32"
_HOW = "`python -m data_pipelines.precompute EXPERIMENT --only {}` makes {}, data.precomputed=ignore computes them in training"


def base_folder(shard: str, where: str | None) -> Path:
    """The folder of the stored outputs of a shard: ``where``, or beside it."""
    if where is not None:
        return Path(where)
    if is_remote(shard):
        raise UserError(shown(shard), "a remote shard, beside which nothing can be stored", "data.precomputed=FOLDER")
    return Path(os.path.dirname(os.path.abspath(shard))) / FOLDER


def stored_place(index: ShardIndex, name: str, fingerprint: str, where: str | None) -> Path:
    """The tar of the outputs of one name and fingerprint for a shard."""
    stem = f"{PurePosixPath(index.path).stem}-{index.sha256[:8]}"
    return base_folder(index.path, where) / f"{name}-{fingerprint[:16]}" / f"{stem}-000000.tar"


def sealed(content: bytes) -> bytes:
    """A ``.npy`` with its checksum behind it, where readers of arrays do not look."""
    return content + _SEAL + zlib.crc32(content).to_bytes(4, "little")


def is_intact(content: bytes) -> bool:
    """Whether a ``.npy`` is what was stored; one of an earlier version has no checksum."""
    array, seal, value = content[:-9], content[-9:-4], content[-4:]
    return seal != _SEAL or zlib.crc32(array) == int.from_bytes(value, "little")


class StoredOutputs:
    """Outputs of one name for some shards: ``places`` has the tar of outputs by the path of the shard."""

    def __init__(self, name: str, places: dict[str, Path]) -> None:
        self.name = name
        self.sides = {shard: load_index(str(place)) for shard, place in places.items()}

    def read(self, files: RangeReader, index: ShardIndex, number: int) -> dict[str, Tensor]:
        """The entries of a sample, by the name in ``Batch.extras``; the first dimension counts entries."""
        side, key = self.sides[index.path], index.key(number)
        if len(side) != len(index) or side.key(number) != key:
            numbers = _numbers_of(side)
            if key not in numbers:
                raise BadSampleError(f"no stored '{self.name}' for this sample, which could not be used when they were made")
            number = numbers[key]
        members = {name: content for name, content in files.members(side, number).items() if name.endswith(".npy")}
        if changed := [name for name, content in members.items() if not is_intact(content)]:
            found = f"'{changed[0]}' of '{key}' is not what was stored"
            raise UserError(side.path, found, hint=f"remove the file; {_HOW.format(self.name, 'it again')}")
        return {name.removesuffix(".npy"): decode_array(content) for name, content in members.items()}


@lru_cache(64)
def _numbers_of(side: ShardIndex) -> dict[str, int]:
    return {key: number for number, key in enumerate(side.keys())}


def _find_stored(
    name: str, item: Precomputable, transform: ImageTransform, indexes: Sequence[ShardIndex], where: str | None
) -> StoredOutputs | None:
    """The stored outputs of some shards; None where nothing of that name was ever stored for any of them.

    What was made with other weights or another transform, or for a part of the shards only, is a ``UserError``.
    """
    if where is None and any(is_remote(index.path) for index in indexes):
        return None  # beside a remote shard nothing can have been written
    bases = {base_folder(index.path, where) for index in indexes}
    stored = [folder for base in sorted(bases) for folder in base.glob(f"{name}-*") if folder.is_dir()]
    if not stored:
        return None  # before the fingerprint is asked for: weights take a while to hash
    expected = item.fingerprint(transform.to_json())
    places = {index.path: stored_place(index, name, expected, where) for index in indexes}
    missing = [path for path, place in places.items() if not place.is_file()]
    if not missing:
        return StoredOutputs(name, places)
    if any(place.parent in stored for place in places.values()):
        found = f"stored '{name}' for {len(places) - len(missing)} of {len(places)} shards, not for {missing[0]}"
        raise UserError("data.precomputed", found, "all of them", _HOW.format(name, "the rest"))
    found = f"stored '{name}' of other weights or another transform ({stored[0]})"
    raise UserError("data.precomputed", found, expected[:16], _HOW.format(name, "them again"))


def stored_for(
    trainer: Trainer, stage: str, sources: Sequence[OpenSource], transform: ImageTransform, where: str | None
) -> list[StoredOutputs]:
    """Stored outputs of the frozen parts of the method that a trainer trains or scores.

    Looked for when a loader is made: only then a resume has its weights.
    """
    method, callbacks = trainer.lightning_module, trainer.callbacks  # type: ignore[attr-defined]
    named = {name for source in sources for name in source.task.extras}
    indexes = [index for source in sources for index in source.indexes]
    items = method.precomputable() if isinstance(method, Method) else {}
    wanted = {name: item for name, item in items.items() if name not in named}
    stored = stored_items(wanted, transform, indexes, where)
    changing = [callback for callback in callbacks if getattr(callback, "changes_images", False)]
    if stored and changing and stage == "train":
        both = f"{type(changing[0]).__name__}, which changes the images, and stored outputs of the unchanged ones"
        raise UserError("callbacks", both, "one of them", "data.precomputed=ignore computes them in training instead")
    return stored


def stored_items(
    items: Mapping[str, Precomputable], transform: ImageTransform, indexes: Sequence[ShardIndex], where: str | None
) -> list[StoredOutputs]:
    """The stored values of some outputs for some shards."""
    found = [_find_stored(name, item, transform, indexes, where) for name, item in items.items()]
    return [outputs for outputs in found if outputs is not None]
