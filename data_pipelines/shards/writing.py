"""Writer of plain tar shards in the WebDataset layout, each with its index beside it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from data_pipelines.shards.indexing import index_path, index_tar, write_json

_OWNER = "umm_zoo"


@dataclass
class WriteSummary:
    """What was written: tar files in order, samples, members by extension, and samples by the ``kind`` in their json."""

    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)


class IndexedShardWriter:
    """Writes samples into ``OUT/NAME-000000.tar`` and so on, each tar with its index beside it.

    Bytes depend on the samples alone (fixed times and owners). A shard appears under its name only when it is complete: until
    then, and if the writing fails, it is a hidden temporary file that is removed again.

    Args:
        out: folder, made if need be.
        name: first part of the file names.
        samples_per_shard: most samples in one tar.
        first_shard: number of the first tar, for a writer that goes on where another stopped.

    Raises:
        ValueError: the name or a number is not usable, or a sample is (see `write`).
    """

    def __init__(self, out: str | Path, name: str, samples_per_shard: int = 1000, first_shard: int = 0) -> None:
        if not name or "/" in name or "%" in name:
            raise ValueError(f"shard name: found {name!r}, expected a plain file name without / and %")
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard: found {samples_per_shard}, expected 1 or more")
        self.out = Path(out)
        self.name = name
        self.samples_per_shard = samples_per_shard
        self.first_shard = first_shard
        self.summary = WriteSummary()
        self._keys: set[str] = set()
        self._stream: IO[bytes] | None = None
        self._temporary: Path | None = None
        self._writer: Any = None

    def __enter__(self) -> IndexedShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Write one sample.

        Args:
            sample: ``__key__`` (no dot) and the members by extension (``json``, ``0.png``, ``target.png``): bytes, text, or for
                ``json`` a dict.

        Raises:
            ValueError: the key is missing, repeated or holds a dot, or a member is neither bytes, text nor a dict.
        """
        key = sample.get("__key__")
        if not isinstance(key, str) or not key or "." in key:
            raise ValueError(f"{self.name}: a sample needs a '__key__' without a dot, found {key!r}")
        if key in self._keys:
            raise ValueError(f"{self.name}: the key {key!r} came twice")
        members = {extension: self._encode(key, extension, value) for extension, value in sample.items() if extension != "__key__"}
        if not members:
            raise ValueError(f"{self.name}: the sample {key!r} has no members")
        if self._writer is None:
            self._open()
        self._writer.write({"__key__": key, **members})
        self._keys.add(key)
        self.summary.samples += 1
        self.summary.members.update(members.keys())
        row = sample.get("json")
        if isinstance(row, Mapping):
            self.summary.kinds[str(row.get("kind", ""))] += 1

    def close(self) -> None:
        """Finish the last shard. Writing no sample at all leaves no file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _encode(self, key: str, extension: str, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, Mapping) and extension == "json":
            return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        found = f"member {extension!r} of {key!r} is {type(value).__name__}"
        raise ValueError(f"{self.name}: {found}, expected bytes, text, or a dict as json")

    def _open(self) -> None:
        from webdataset import ShardWriter  # slow to import, and reading an index does not need it

        self.out.mkdir(parents=True, exist_ok=True)
        self._writer = ShardWriter(
            f"{self.name}-%06d.tar",
            maxcount=self.samples_per_shard,
            start_shard=self.first_shard,
            maxsize=float("inf"),
            post=self._finish,
            verbose=0,
            opener=self._open_stream,
            encoder=False,
            mtime=0,
            user=_OWNER,
            group=_OWNER,
            format="PAX_FORMAT",  # long keys need it
        )

    def _open_stream(self, file_name: str) -> IO[bytes]:
        self._temporary = self.out / f".{file_name}.partial"
        self._stream = open(self._temporary, "wb")  # noqa: SIM115 - closed by _finish or _discard
        return self._stream

    def _finish(self, file_name: str) -> None:
        assert self._stream is not None and self._temporary is not None
        self._stream.close()
        final = self.out / file_name
        index = index_tar(self._temporary)
        # An old index must not stand beside a new tar, not even for a moment.
        index_path(final).unlink(missing_ok=True)
        os.replace(self._temporary, final)
        write_json(index_path(final), index)
        self._stream = self._temporary = None
        self.summary.shards.append(final)

    def _discard(self) -> None:
        if self._writer is not None and self._writer.tarstream is not None:
            self._writer.tarstream.close()  # or its destructor would write into the closed file
        if self._stream is not None:
            self._stream.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        self._writer = self._stream = self._temporary = None


def write_shards(samples: Iterable[Mapping[str, Any]], out: str | Path, name: str, samples_per_shard: int = 1000) -> WriteSummary:
    """Write all samples with an `IndexedShardWriter` and say what was written.

    Raises:
        ValueError: a sample or an argument is not usable; complete shards written before it stay.
    """
    with IndexedShardWriter(out, name, samples_per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return writer.summary
