"""Writer of plain tar shards in the WebDataset layout, each with its index beside it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipelines.shards.indexing import index_path, index_tar, write_index


@dataclass
class WriteSummary:
    """Summary of what was written: tars in order, samples, members by extension, and samples by the ``kind`` in their json."""

    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)


class IndexedShardWriter:
    """Writer of samples into ``OUT/NAME-000000.tar`` and so on, each tar with its index beside it.

    Bytes depend on the samples alone (fixed times and owners). A shard appears under its name only when it is complete: until
    then, and if the writing fails, it is a hidden temporary file that is removed again.
    ``first_shard`` is the number of the first tar, for a writer that goes on where another stopped.
    """

    def __init__(self, out: str | Path, name: str, samples_per_shard: int = 1000, first_shard: int = 0) -> None:
        if not name or "/" in name or "%" in name:
            raise ValueError(f"shard name: found {name!r}, expected a plain file name without / and %")
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard: found {samples_per_shard}, expected 1 or more")
        self.out, self.name, self.samples_per_shard = Path(out), name, samples_per_shard
        self.summary = WriteSummary()
        self._keys: set[str] = set()
        self._tar: Any = None
        self._number, self._count = first_shard, 0

    def __enter__(self) -> IndexedShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    @property
    def _partial(self) -> Path:
        return self.out / f".{self.name}-{self._number:06d}.tar.partial"

    def write(self, sample: Mapping[str, Any]) -> None:
        """Write one sample: ``__key__`` (no dot) and members by extension (``json``, ``0.png``): bytes, text, or a dict as json."""
        key = sample.get("__key__")
        if not isinstance(key, str) or not key or "." in key:
            raise ValueError(f"{self.name}: a sample needs a '__key__' without a dot, found {key!r}")
        if key in self._keys:
            raise ValueError(f"{self.name}: the key {key!r} came twice")
        members = {extension: self._encode(key, extension, value) for extension, value in sample.items() if extension != "__key__"}
        if not members:
            raise ValueError(f"{self.name}: the sample {key!r} has no members")
        if self._count == self.samples_per_shard:
            self.close()
        if self._tar is None:
            from webdataset import TarWriter  # slow to import, and reading an index does not need it

            self.out.mkdir(parents=True, exist_ok=True)
            stream = open(self._partial, "wb")  # noqa: SIM115 - closed with the shard
            # long keys need pax
            self._tar = TarWriter(stream, user="umm_zoo", group="umm_zoo", encoder=False, mtime=0, format="PAX_FORMAT")
        with self._naming():
            self._tar.write({"__key__": key, **members})
        self._keys.add(key)
        self._count += 1
        self.summary.samples += 1
        self.summary.members.update(members.keys())
        if isinstance(row := sample.get("json"), Mapping):
            self.summary.kinds[str(row.get("kind", ""))] += 1

    def close(self) -> None:
        """Finish the last shard. Writing no sample at all leaves no file."""
        if self._tar is None:
            return
        final = self.out / f"{self.name}-{self._number:06d}.tar"
        with self._naming():
            self._tar.close()
            self._tar.stream.close()
            index = index_tar(self._partial)
            index_path(final).unlink(missing_ok=True)  # an old one must not stand beside a new tar, not even for a moment
            os.replace(self._partial, final)
            write_index(index_path(final), index, final.stat().st_mtime_ns)
        self.summary.shards.append(final)
        self._tar, self._number, self._count = None, self._number + 1, 0

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Remove what was begun where it cannot be finished, and name it where the system refuses (a full disk)."""
        try:
            yield
        except BaseException as error:
            self._discard()
            if not isinstance(error, OSError):
                raise
            tar = self.out / f"{self.name}-{self._number:06d}.tar"
            raise OSError(error.errno, error.strerror or str(error), str(tar)) from error

    def _discard(self) -> None:
        if self._tar is not None:
            for stream in (self._tar, self._tar.stream):
                with suppress(OSError):  # a full disk takes no last block either
                    stream.close()
            self._partial.unlink(missing_ok=True)
            self._tar = None

    def _encode(self, key: str, extension: str, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, Mapping) and extension == "json":
            return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        found = f"member {extension!r} of {key!r} is {type(value).__name__}"
        raise ValueError(f"{self.name}: {found}, expected bytes, text, or a dict as json")


def write_shards(samples: Iterable[Mapping[str, Any]], out: str | Path, name: str, samples_per_shard: int = 1000) -> WriteSummary:
    """Write all samples with an `IndexedShardWriter` and say what was written; complete shards stay if a sample is not usable."""
    with IndexedShardWriter(out, name, samples_per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return writer.summary
