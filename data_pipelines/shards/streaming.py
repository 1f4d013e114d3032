"""``StreamData``: shards without an index, for data that is read once, or that cannot be indexed.

Nothing is known of such a shard but its bytes, so the order is a shuffle within a buffer, shards are what ranks and workers share
out, and a resume is approximate. ``python -m data_pipelines.index`` makes an index, with which ``ShardData`` is exact.
"""

from __future__ import annotations

import logging
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipelines.decoding import BadSampleError
from data_pipelines.shards.addresses import shown
from data_pipelines.shards.archive import Members, read_samples
from data_pipelines.shards.batches import RawBatch, RawBatchBuilder
from data_pipelines.shards.expanding import expand
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.loading import BatchLoader, alone
from data_pipelines.shards.module import ShardModule, check_positive, refuse_another_order
from data_pipelines.shards.order import permutation
from data_pipelines.shards.sources import ShardSource, in_data
from data_pipelines.transforms.image_transform import ImageTransform
from umm_zoo.backbones.preparation import Preparation
from umm_zoo.errors import UserError

log = logging.getLogger(__name__)

NOTE = (
    "data: these shards are streamed without an index: samples are shuffled within a buffer, and a resume is approximate (it goes "
    "on with whole shards; some samples come again); `python -m data_pipelines.index SHARD…` and ShardData make both exact"
)
_note_once = cache(log.warning)


class Progress(NamedTuple):
    """Progress of a stream: its epoch, and the shards of it whose samples have all been delivered."""

    epoch: int = 0
    shards: int = 0


@dataclass
class StreamedBatch(RawBatch):
    """Raw batch with the progress of its worker; None at the end of what is not endless."""

    progress: Progress | None = None
    worker: int = 0


class _Held(NamedTuple):
    shard: int
    source: str
    path: str
    key: str
    members: Members


@dataclass(eq=False)
class ShardStream(IterableDataset[StreamedBatch]):
    """Raw batches of one rank, read from whole shards.

    Epoch ``e`` permutes the shards by (seed, e); stream ``s`` of S (ranks x workers) reads every S-th of them, so that every sample
    of the epoch is delivered once, by one rank.

    Args:
        stage: ``train`` goes on with the next epoch, without end; ``val`` reads one epoch in the order on disk.
        shards: (source, path) of each shard.
        ranks: (number of ranks, this rank).
        buffer: samples among which the next one of a training is drawn; 1 keeps the order on disk.
        start: where to go on: an epoch, and how many of its shards (in its order) are done.
    """

    stage: str
    shards: Sequence[tuple[str, str]]
    sources: dict[str, ShardSource]
    transform: ImageTransform
    batch_size: int
    ranks: tuple[int, int]
    seed: int
    buffer: int
    start: Progress
    prepare: Preparation | None = None

    def __post_init__(self) -> None:
        self.endless = self.stage == "train"
        self.buffer = self.buffer if self.endless else 1
        self._builder = RawBatchBuilder(self.transform, self.prepare)

    def __iter__(self) -> Iterator[StreamedBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        num_ranks, rank = self.ranks
        try:
            yield from self._deliver(rank * workers + worker, num_ranks * workers, worker)
        except UserError as error:
            yield StreamedBatch(error=error)

    def _deliver(self, stream: int, streams: int, worker: int) -> Iterator[StreamedBatch]:
        skips: list[Skip] = []
        self._builder.start(self.batch_size)
        for progress, made in self._samples(stream, streams):
            if isinstance(made, Skip):
                skips.append(made)
            ended = made is None and not self.endless
            if len(self._builder) == self.batch_size or (ended and (len(self._builder) or skips)):
                raw = self._builder.build(skips)
                yield StreamedBatch(**vars(raw), progress=progress if self.stage == "train" else None, worker=worker)
                skips = []
                self._builder.start(self.batch_size)

    def _samples(self, stream: int, streams: int) -> Iterator[tuple[Progress, str | Skip | None]]:
        """The progress after each sample that became a row (its key) or was skipped; None at the end of an epoch."""
        epoch, offset = self.start
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
                found = f"no usable sample in the {len(mine)} shards that rank {self.ranks[1]} reads"
                raise UserError(f"data.{self.stage}", found, f"at least one ({reason})")
            epoch, offset = epoch + 1, 0
            yield Progress(epoch, 0), None
            if not self.endless:
                return

    def _shuffled(self, shards: list[tuple[str, str]], epoch: int, stream: int) -> Iterator[tuple[int, str | Skip]]:
        """Samples drawn from a buffer, with the number of leading shards of which none is still to come."""
        random = np.random.RandomState([self.seed & 0xFFFFFFFF, epoch, stream])
        held: list[_Held] = []
        waiting: Counter[int] = Counter()
        number = 0

        def drawn() -> tuple[int, str | Skip]:
            one = held.pop(int(random.randint(len(held))) if self.buffer > 1 else 0)
            waiting[one.shard] -= 1
            finished = min((n for n, count in waiting.items() if count), default=number)
            return min(finished, number), self._add(one)

        for number, (source, path) in enumerate(shards):
            try:
                for key, members in read_samples(path):
                    held.append(_Held(number, source, path, key, members))
                    waiting[number] += 1
                    if len(held) >= self.buffer:
                        yield drawn()
            except (tarfile.TarError, OSError, ValueError) as error:
                yield number, Skip(self.stage, source, shown(path), "*", f"the rest of the shard cannot be read: {error}", -1)
        number = len(shards)
        while held:
            yield drawn()

    def _add(self, one: _Held) -> str | Skip:
        """Make a sample the next row of the batch; its key, or why it is skipped."""
        row = Skip(self.stage, one.source, shown(one.path), one.key, one.members.refused, -1)
        if row.reason:
            return row
        try:
            self._builder.add(row, self.sources[one.source].task, one.members)
            return row.name
        except BadSampleError as error:
            return replace(row, reason=str(error))


@dataclass(eq=False, repr=False)
class StreamData(ShardModule):
    """Training and validation batches from tar shards without an index; see ``ShardData`` for those that have one.

    Sources are read together, each shard once per epoch; a weight is refused. Ranks and workers share out whole shards, and a
    stream without a shard is refused. The next sample is drawn from a ``buffer`` of so many; all else is as in ``ShardModule``.
    """

    buffer: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(buffer=self.buffer)
        for name, source in self.sources["train"].items():
            if source.weight is not None:
                raise UserError(f"data.train.{name}.weight", str(source.weight), "none for streamed sources (index them)")
        self._start = Progress()
        self._reached: dict[int, Progress] = {}

    def check(self) -> None:
        """Find every shard now."""
        for stage in ("train", "val"):
            self._shards(stage)

    def setup(self, stage: str) -> None:
        """A fit starts at its first epoch unless a checkpoint is loaded after this."""
        if stage == "fit":
            self._start, self._reached = Progress(), {}
        super().setup(stage)

    def train_dataloader(self) -> BatchLoader:
        """Endless batches, from where a checkpoint got to."""
        if not self.sources["train"]:
            raise UserError("data.train", "no source", "at least one to train on")
        _note_once(NOTE)
        shares = self._ranks()[0] * self._accumulation()
        if self.batch_size % shares:
            raise UserError("data.batch_size", str(self.batch_size), f"a multiple of {shares} (ranks, micro-batches)")
        return self._loader("train", self.batch_size // shares, self.num_workers)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """Every validation sample once, by one rank; an empty list where there is no source."""
        # few validation shards must not be too few for the workers
        return self._loader("val", self.val_batch_size, workers=0) if self.sources["val"] else []

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its shards every stream of this rank has delivered, and what their order depends on."""
        least = min(self._reached.values()) if len(self._reached) >= max(1, self.num_workers) else self._start
        return {**least._asdict(), "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the first shards that were not delivered whole; a ``UserError`` where their order is another one now."""
        refuse_another_order(state_dict.get("order", {}), self._order(), "shards")
        self._start, self._reached = Progress(int(state_dict["epoch"]), int(state_dict["shards"])), {}

    def _order(self) -> dict[str, Any]:
        """What a number of delivered shards means; ranks, workers and the buffer's size decide only which samples come again."""
        shards = self._shards("train")
        names = "\n".join(f"{source} {PurePosixPath(path).name}" for source, path in shards)
        counts = dict(Counter(source for source, _ in shards))
        return {"seed": self.seed, "shuffled": self.buffer > 1, "sources": counts, "names of shards": zlib.crc32(names.encode())}

    def _loader(self, stage: str, batch_size: int, workers: int) -> BatchLoader:
        shards, ranks = self._shards(stage), self._ranks()
        streams = ranks[0] * max(1, workers)
        if len(shards) < streams:
            found = f"{len(shards)} shards for {ranks[0]} ranks x {max(1, workers)} workers"
            expected = "at least one for each, since streamed shards are shared out whole (fewer workers, or an index)"
            raise UserError(f"data.{stage}", found, expected)
        start = self._start if stage == "train" else Progress()
        # every stream needs a shard of what is left of the epoch: some that were delivered come again
        start = Progress(start.epoch, min(start.shards, len(shards) - streams))
        sources = self.sources[stage]
        prepare, shape = self._preparation(stage), (batch_size, ranks)
        stream = ShardStream(stage, shards, sources, self.transform, *shape, self.seed, self.buffer, start, prepare)
        per_step = self._accumulation() if stage == "train" else 1
        loader = DataLoader(stream, batch_size=None, num_workers=workers, worker_init_fn=alone(workers))
        deliver, packed = partial(self._deliver, stage=stage), self.trainer is not None
        return BatchLoader(loader, deliver, packed=packed, per_step=per_step, pinned=self._pinned())

    def _shards(self, stage: str) -> list[tuple[str, str]]:
        with in_data():
            return [(name, path) for name, source in self.sources[stage].items() for path in expand(source.shards)]

    def _deliver(self, raw: RawBatch, stage: str) -> RawBatch:
        taken = super()._deliver(raw, stage)
        if isinstance(raw, StreamedBatch) and raw.progress is not None:
            self._reached[raw.worker] = raw.progress
        return taken
