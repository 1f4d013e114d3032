"""Shards without an index, read from front to back through webdataset: for data that is read once, or that cannot be indexed.

Nothing is known of such a shard but its bytes, so the order is a shuffle within a buffer, shards are what ranks and workers share
out, and a resume is approximate. ``python -m data_pipelines.index`` makes an index, with which ``ShardData`` is exact.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import webdataset as wds
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipelines.decoding import BadSampleError, Resize, Square, decode_image
from data_pipelines.shards.addresses import expand, filesystem, is_remote
from data_pipelines.shards.data import ShardSource
from data_pipelines.shards.ledger import Ledger, Skip
from data_pipelines.shards.order import permutation
from data_pipelines.shards.reading import Row, Shipment, stack
from data_pipelines.shards.writing import split_member_name
from umm_zoo.batch import Batch
from umm_zoo.errors import MistakeError

log = logging.getLogger(__name__)

NOTE = (
    "data: these shards are streamed without an index: samples are shuffled within a buffer, and a resume is approximate (it goes "
    "on with whole shards; some samples come again); `python -m data_pipelines.index SHARD…` and ShardData make both exact"
)
_noted = False
_BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX")


def _note_once() -> None:
    global _noted
    if not _noted:
        log.warning(NOTE)
        _noted = True


@dataclass
class Progress:
    """How far a stream has got: its epoch, and the shards of it whose samples have all been delivered."""

    epoch: int = 0
    shards: int = 0


@dataclass
class _Delivered(Shipment):
    progress: Progress | None = None
    worker: int = 0


class ShardStream(IterableDataset[_Delivered]):
    """Batches of one rank, read from whole shards by webdataset.

    Epoch ``e`` permutes the shards by (seed, e); stream ``s`` of S (ranks x workers) reads every S-th of them, so that every sample
    of the epoch is delivered once, by one rank.

    Args:
        shards: (source, path) of each shard.
        sources: by name.
        batch_size: samples per batch.
        image_size: edge of input images.
        target_size: edge of images to be drawn.
        resize: how images become square.
        rank: this rank.
        num_ranks: of all.
        seed: chooses the order.
        buffer: samples among which the next is drawn; 1 keeps the order on disk.
        start: where to go on: an epoch, and how many of its shards (in its order) are done.
        endless: go on with the next epoch.
        stage: for the ledger.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, str]],
        sources: dict[str, ShardSource],
        batch_size: int,
        image_size: int,
        target_size: int,
        resize: Resize,
        rank: int,
        num_ranks: int,
        seed: int,
        buffer: int,
        start: Progress,
        endless: bool,
        stage: str,
    ) -> None:
        self.shards, self.sources, self.batch_size = list(shards), sources, batch_size
        self.image_size, self.target_size, self.resize = image_size, target_size, resize
        self.rank, self.num_ranks, self.seed, self.buffer = rank, num_ranks, seed, buffer
        self.start, self.endless, self.stage = start, endless, stage

    def __iter__(self) -> Iterator[_Delivered]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        stream, streams = self.rank * workers + worker, self.num_ranks * workers
        try:
            yield from self._deliver(stream, streams, worker)
        except MistakeError as error:
            yield _Delivered(error=error)

    def _deliver(self, stream: int, streams: int, worker: int) -> Iterator[_Delivered]:
        rows: list[Row] = []
        skips: list[Skip] = []
        for progress, made in self._samples(stream, streams):
            if isinstance(made, Skip):
                skips.append(made)
            elif made is not None:
                rows.append(made)
            if len(rows) == self.batch_size or (rows and made is None and not self.endless):
                yield _Delivered(**vars(stack(rows, skips)), progress=progress, worker=worker)
                rows, skips = [], []
        if rows or skips:
            yield _Delivered(**vars(stack(rows, skips)), worker=worker)

    def _samples(self, stream: int, streams: int) -> Iterator[tuple[Progress, Row | Skip | None]]:
        """Samples and skips with the progress after each; None at the end of an epoch."""
        epoch, offset = self.start.epoch, self.start.shards
        while True:
            order = permutation(len(self.shards), self.seed, epoch).tolist() if self.buffer > 1 else range(len(self.shards))
            mine = order[offset:][stream::streams]
            delivered, reason = 0, "they are empty"
            for finished, made in self._shuffled([self.shards[number] for number in mine], epoch, stream):
                if isinstance(made, Skip):
                    reason = str(made)
                else:
                    delivered += 1
                yield Progress(epoch, offset + finished * streams), made
            if not delivered and not offset and self.endless:  # or it would look for one for ever
                shards = f"{len(mine)} shards that rank {self.rank} reads"
                raise MistakeError(f"data.{self.stage}: found no usable sample in the {shards}, expected at least one ({reason})")
            epoch, offset = epoch + 1, 0
            yield Progress(epoch, 0), None
            if not self.endless:
                return

    def _shuffled(self, shards: list[tuple[str, str]], epoch: int, stream: int) -> Iterator[tuple[int, Row | Skip]]:
        """Samples drawn from a buffer, with the number of leading shards of which none is still to come."""
        random = np.random.RandomState([self.seed & 0xFFFFFFFF, epoch, stream])
        held: list[tuple[int, str, str, dict[str, bytes]]] = []
        waiting: Counter[int] = Counter()
        number = 0

        def drawn() -> tuple[int, Row | Skip]:
            place = int(random.randint(len(held))) if self.buffer > 1 else 0
            shard, source, key, members = held.pop(place)
            waiting[shard] -= 1
            finished = min((n for n, count in waiting.items() if count), default=number)
            return min(finished, number), self._row(source, shards[shard][1], key, members)

        for number, (source, path) in enumerate(shards):
            try:
                for key, members in self._read(path):
                    held.append((number, source, key, members))
                    waiting[number] += 1
                    if len(held) >= self.buffer:
                        yield drawn()
            except (tarfile.TarError, OSError, ValueError) as error:
                yield number, Skip(self.stage, source, path, "*", f"the rest of the shard cannot be read: {error}", -1)
        number = len(shards)
        while held:
            yield drawn()

    def _row(self, source: str, path: str, key: str, members: dict[str, bytes]) -> Row | Skip:
        try:
            read = self.sources[source].task(key, members)
            return Row(
                key=f"{source}/{PurePosixPath(path).name}:{key}",
                conversation=read.conversation,
                images=[decode_image(content, self.image_size, self.resize) for content in read.images],
                target=None if read.target is None else decode_image(read.target, self.target_size, self.resize),
                meta=read.meta,
                extras=read.extras,
            )
        except BadSampleError as error:
            return Skip(self.stage, source, path, key, str(error), -1)

    @staticmethod
    def _read(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of one tar in order; the file is opened here, for webdataset would start a shell for an address."""
        with filesystem(path).open(path, "rb") if is_remote(path) else open(path, "rb") as file:
            key, members = "", dict[str, bytes]()
            watched = _Watched(file)
            for entry in wds.tariterators.tar_file_iterator(watched, skip_meta=None, handler=wds.reraise_exception):
                own, name = split_member_name(entry["fname"])
                if own and own != key:
                    if members:
                        yield key, members
                    key, members = own, {}
                if own:
                    members.setdefault(name, entry["data"])
            watched.check_end()  # before the last sample, of which the end may be missing
            if members:
                yield key, members


class _Watched:
    """Passes the bytes of a tar on and looks at its end: Python's tarfile takes an archive cut between members for a whole one."""

    def __init__(self, file: Any) -> None:
        self._file, self._head, self._tail = file, b"", b""

    def read(self, size: int = -1) -> bytes:
        """Bytes of the file."""
        content: bytes = self._file.read(size)
        self._head = self._head or content[:4]
        self._tail = (self._tail + content)[-_BLOCK:]
        return content

    def check_end(self) -> None:
        """Raises:
        tarfile.ReadError: a plain tar that does not end in an empty block.
        """
        while self.read(1 << 20):
            pass
        if not self._head.startswith(_COMPRESSED) and (len(self._tail) < _BLOCK or self._tail.strip(b"\0")):
            raise tarfile.ReadError("the archive is cut short")


class StreamData(LightningDataModule):
    """Training and validation batches from tar shards without an index; see ``ShardData`` for those that have one.

    Sources are read together, each shard once per epoch; weights are not honoured. Ranks and workers share out whole shards, and a
    stream without a shard is refused.

    Args:
        train: training sources by name.
        val: validation sources by name.
        image_size: edge of input images.
        batch_size: global batch, per optimiser step.
        val_batch_size: per rank.
        num_workers: processes that read and decode ahead, per rank.
        buffer: samples among which the next is drawn.
        max_skips: bad samples after which the run stops.
        seed: chooses the order.
        resize: how images become square.
        target_size: edge of images to be drawn; ``image_size`` where None.

    Raises:
        ValueError: a size is not positive, or a source has a weight.
    """

    def __init__(
        self,
        train: dict[str, ShardSource] | None = None,
        val: dict[str, ShardSource] | None = None,
        image_size: int = 32,
        batch_size: int = 64,
        val_batch_size: int = 64,
        num_workers: int = 0,
        buffer: int = 1000,
        max_skips: int = 100,
        seed: int = 0,
        resize: Resize | None = None,
        target_size: int | None = None,
    ) -> None:
        super().__init__()
        named = {"image_size": image_size, "batch_size": batch_size, "val_batch_size": val_batch_size, "buffer": buffer}
        for name, value in named.items():
            if value < 1:
                raise ValueError(f"data.{name}: found {value}, expected positive whole numbers")
        self.sources = {"train": dict(train or {}), "val": dict(val or {})}
        for name, source in self.sources["train"].items():
            if source.weight is not None:
                raise ValueError(f"data.train.{name}.weight: found {source.weight}; streamed sources have none (index them)")
        self.image_size, self.target_size = image_size, target_size or image_size
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self.buffer, self.seed, self.resize = buffer, seed, resize if resize is not None else Square()
        self.ledger = Ledger(max_skips)
        self._start = Progress()
        self._reached: dict[int, Progress] = {}

    def check(self) -> None:
        """Find every shard now."""
        for stage in ("train", "val"):
            self._shards(stage)

    def setup(self, stage: str) -> None:
        """Skips are written into the run folder."""
        self.ledger.rank = self._ranks()[1]
        if stage == "fit":
            self._start, self._reached = Progress(), {}
            if self.trainer is not None and os.path.abspath(self.trainer.default_root_dir) != os.getcwd():
                self.ledger.open(self.trainer.default_root_dir)

    def train_dataloader(self) -> _StreamLoader:
        """Endless batches, from where a checkpoint got to.

        Raises:
            MistakeError: fewer shards than ranks x workers, or a batch that cannot be shared out.
        """
        if not self.sources["train"]:
            raise MistakeError("data.train: found no source, training needs at least one")
        _note_once()
        ranks = self._ranks()[0]
        accumulation = self.trainer.accumulate_grad_batches if isinstance(self.trainer, Trainer) else 1
        if self.batch_size % (ranks * accumulation):
            raise MistakeError(
                f"data.batch_size: found {self.batch_size}, expected multiples of {ranks * accumulation} (ranks, micro-batches)"
            )
        return self._loader("train", self.batch_size // (ranks * accumulation), self._start, endless=True)

    def val_dataloader(self) -> _StreamLoader | list[Any]:
        """Every validation sample once, by one rank; an empty list where there is no source."""
        return self._loader("val", self.val_batch_size, Progress(), endless=False) if self.sources["val"] else []

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its shards every stream of this rank has delivered."""
        reached = sorted(self._reached.values(), key=lambda progress: (progress.epoch, progress.shards))
        least = reached[0] if len(reached) >= max(1, self.num_workers) else self._start
        return {"epoch": least.epoch, "shards": least.shards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the first shards that were not delivered whole."""
        self._start, self._reached = Progress(int(state_dict["epoch"]), int(state_dict["shards"])), {}

    def _loader(self, stage: str, batch_size: int, start: Progress, endless: bool) -> _StreamLoader:
        shards, (ranks, rank) = self._shards(stage), self._ranks()
        workers = self.num_workers if endless else 0  # few validation shards must not be too few for the workers
        if len(shards) < ranks * max(1, workers):
            raise MistakeError(
                f"data.{stage}: found {len(shards)} shards for {ranks} ranks x {max(1, workers)} workers; streamed shards are "
                "shared out whole, so every worker needs at least one (fewer workers, or an index)"
            )
        # every stream needs a shard of what is left of the epoch: some that were delivered come again
        start = Progress(start.epoch, min(start.shards, len(shards) - ranks * max(1, workers)))
        stream = ShardStream(
            shards,
            self.sources[stage],
            batch_size,
            self.image_size,
            self.target_size,
            self.resize,
            rank,
            ranks,
            self.seed,
            self.buffer if endless else 1,
            start,
            endless,
            stage,
        )
        return _StreamLoader(stream, workers, self)

    def _shards(self, stage: str) -> list[tuple[str, str]]:
        return [(name, path) for name, source in self.sources[stage].items() for path in expand(source.shards)]

    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def deliver(self, shipment: _Delivered) -> None:
        """Take note of skips and progress."""
        for skip in shipment.skips:
            if self.ledger.add(skip):
                log.warning("skipped %s", skip)
        if shipment.progress is not None:
            self._reached[shipment.worker] = shipment.progress


class _StreamLoader:
    """Batches, with skips and progress told to the data module as they arrive."""

    def __init__(self, stream: ShardStream, workers: int, data: StreamData) -> None:
        self._data, self._training = data, stream.endless
        self._loader: DataLoader[_Delivered] = DataLoader(stream, batch_size=None, num_workers=workers)

    def __iter__(self) -> Iterator[Batch]:
        for shipment in self._loader:
            if shipment.error is not None:
                raise shipment.error
            if not self._training:
                shipment.progress = None
            self._data.deliver(shipment)
            if shipment.keys:
                yield shipment.batch()


__all__ = ["NOTE", "ShardStream", "StreamData"]
