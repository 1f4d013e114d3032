"""``ShardData``: tar shards as a Lightning data module whose order of samples survives anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

from lightning import Trainer
from rich.console import Console, Group
from rich.table import Column, Table

from data_pipelines.shards.batches import RawBatch
from data_pipelines.shards.bucketing import Bucketing
from data_pipelines.shards.buckets import SampleBuckets, bucket_table
from data_pipelines.shards.cache import ShardCache
from data_pipelines.shards.dealing import BucketedOrder
from data_pipelines.shards.ledger import Skip
from data_pipelines.shards.loading import BatchLoader, TrainingBatchSampler, ValidationBatchSampler, reading_loader
from data_pipelines.shards.mixing import BLOCK, make_stream
from data_pipelines.shards.module import ShardModule, refuse_another_order
from data_pipelines.shards.order import Stream
from data_pipelines.shards.position import TrainingPosition
from data_pipelines.shards.reading import TRIES, BatchRequest, SamplePosition, SampleReader
from data_pipelines.shards.sources import OpenSource, ShardSource, in_data
from data_pipelines.shards.stored import StoredOutputs, stored_for
from umm_zoo.errors import Count, Natural, UserError, printable

__all__ = ["ShardData", "ShardSource"]


@dataclass(eq=False, repr=False)
class ShardData(ShardModule):
    """Training and validation batches from indexed tar shards; the other arguments are those of ``ShardModule``.

    The training stream is endless and a pure function of (sources, seed, window, bucketing): global batch ``k`` is the same list of
    samples for any number of ranks, workers and micro-batches. A checkpoint holds the number of samples consumed, and resuming
    costs the same at any position. ``batch_size`` counts the samples of one optimiser step over all ranks and micro-batches.

    A sample that cannot be used is recorded with shard, key and reason, and its batch is smaller by it.

    Args:
        window: shards whose samples are shuffled together; 0 does not shuffle.
        cache: folder on a local disk in which whole remote shards are kept, shared by all processes of the machine; None reads each
            sample by range requests.
        cache_gb: most that ``cache`` may hold; shards used longest ago make space.
        precomputed: where the outputs of frozen parts lie that ``data_pipelines.precompute`` stored: ``beside`` the shards, a
            folder, or ``ignore`` to compute them in training. Used where they are there; refused where they are stale.
        bucketing: which samples go well into one batch; None makes batches of any. Indexes without sizes of images are made again.
        bucket_size: samples of a global batch that are of one bucket, of which ``batch_size`` is a multiple; None is all of them.
            Those of one micro-batch over all ranks cost no more, and every optimiser step sees some of all buckets.
    """

    window: Natural = 16
    cache: str | None = None
    cache_gb: float = 100.0
    precomputed: str = "beside"
    bucketing: Bucketing | None = None
    bucket_size: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bucketing is not None and self.window == 0:
            raise UserError(
                "data.window", "0, the written order, which buckets would change", "1 or more where there is data.bucketing"
            )
        if self.bucket_size is not None and (self.bucketing is None or self.batch_size % self.bucket_size):
            expected = f"a divisor of the {self.batch_size} of data.batch_size, where there is data.bucketing"
            raise UserError("data.bucket_size", str(self.bucket_size), expected)
        self.shard_cache = None if self.cache is None else ShardCache(self.cache, self.cache_gb)
        self._opened: dict[str, list[OpenSource]] = {}
        self._position = TrainingPosition(self.batch_size)

    def check(self) -> None:
        """Find and open every shard now, so that what is missing or damaged is said before a model is built."""
        _ = self.stream
        self.open("val")

    def prepare_data(self) -> None:
        """Open the shards, so that missing indexes are made in one process. A run that is only scored needs those of validation."""
        training = self.trainer is None or self.trainer.state.fn == "fit"
        for stage in ("train", "val") if training else ("val",):
            if self.sources[stage]:
                self.open(stage)

    def setup(self, stage: str) -> None:
        """Open the shards; a fit starts at position 0 unless a checkpoint is loaded after this."""
        if stage == "fit":
            self._position = TrainingPosition(self.batch_size)
            self.open("train")
        self.open("val")
        super().setup(stage)
        self._check_ranks()

    def teardown(self, stage: str) -> None:
        """Write the ledger a last time."""
        if stage == "fit":
            self._write_ledger()

    def open(self, stage: str) -> list[OpenSource]:
        """The opened sources of ``train`` or ``val``."""
        if stage not in self._opened:
            if stage == "train" and not self.sources["train"]:
                raise UserError("data.train", "no source", "at least one to train on")
            with in_data():
                measured = stage == "train" and self.bucketing is not None
                self._opened[stage] = [source.open(name, measured) for name, source in self.sources[stage].items()]
            for source in self._opened[stage]:
                for shard, reason in source.damage.items():
                    self._note(Skip(stage, source.name, shard, "*", reason, -1))
        return self._opened[stage]

    def _check_ranks(self) -> None:
        """Refuse ranks that see other shards: each would count through its own order."""
        sizes: list[Any] = [(stage, source.name, source.sizes) for stage, opened in self._opened.items() for source in opened]
        sizes.append(self.buckets.digest() if self.buckets is not None and "train" in self._opened else "")
        if self.trainer is not None and self.trainer.world_size > 1 and sizes != self.trainer.strategy.broadcast(sizes):
            found = f"other shards, or sizes of images in their indexes, on rank {self.trainer.global_rank} than on rank 0"
            raise UserError("data", found, "the same files for all ranks")

    @cached_property
    def stream(self) -> Stream:
        """The order of the training samples."""
        sizes = {source.name: source.sizes for source in self.open("train")}
        stream = make_stream(sizes, self._weights(), self.seed, self.window)
        if self.buckets is None:
            return stream
        counts = [sum(shards) for shards in sizes.values()]
        return BucketedOrder(stream, self.batch_size, self.buckets, counts, self.seed, self.bucket_size)

    @cached_property
    def buckets(self) -> SampleBuckets | None:
        """The buckets of the training samples."""
        return None if self.bucketing is None else SampleBuckets(self.open("train"), self.bucketing, self.transform)

    def _weights(self) -> dict[str, float | None]:
        return {name: source.weight for name, source in self.sources["train"].items()}

    def train_dataloader(self) -> BatchLoader:
        """Endless batches from the current position on."""
        ranks, rank = self._ranks()
        sampler = TrainingBatchSampler(self.stream, self.position, self.batch_size, self._accumulation(), ranks, rank)
        if self._position.fresh:
            self.ledger.start_afresh(ranks)
        if rank == 0 and self.trainer is not None:
            steps = self.trainer.max_steps
            console = Console(stderr=True, markup=False)
            console.print(self.table(steps * self.batch_size if steps > 0 else None))
            if (buckets := self.bucket_table()) is not None:
                console.print(buckets)
            self._write_ledger()
        self._reader = self.reader("train")
        loader = reading_loader(self._reader, sampler, self.num_workers)
        deliver = partial(self._deliver, stage="train")
        return BatchLoader(loader, deliver, None, self.trainer is not None, self._accumulation(), self._pinned())

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """Every validation sample once, shared out over the ranks; an empty list where there is no source."""
        sources = self.open("val")
        if not sources:
            return []
        sampler = ValidationBatchSampler([len(source) for source in sources], self.val_batch_size, *self._ranks(), self._limit())
        loader = reading_loader(self.reader("val"), sampler, self.num_workers)
        deliver = partial(self._deliver, stage="val")
        return BatchLoader(loader, deliver, len(sampler), packed=self.trainer is not None, pinned=self._pinned())

    def _limit(self) -> int | None:
        """Validation batches of a single rank that are read; None is all."""
        limit = getattr(self.trainer, "limit_val_batches", None)
        return limit if isinstance(limit, int) and not isinstance(limit, bool) else None

    def reader(self, stage: str) -> SampleReader:
        """Reader of the samples of ``train`` or ``val``, and of what is stored for them."""
        sources, stored = self.open(stage), list[StoredOutputs]()
        if self.precomputed != "ignore" and isinstance(self.trainer, Trainer):
            stored = stored_for(self.trainer, stage, sources, self.transform, self.stored_folder())
        prepare = self._preparation(stage)
        return SampleReader(stage, sources, self.transform, stage == "train", self.shard_cache, stored, prepare)

    def stored_folder(self) -> str | None:
        """The folder of stored outputs; None is beside each shard."""
        return None if self.precomputed in ("beside", "ignore") else self.precomputed

    def table(self, samples: int | None = None) -> Table:
        """Sizes and weights of the training sources, and the epochs that ``samples`` samples of the whole stream make."""
        sources = self.open("train")
        columns = (Column(name, justify="right") for name in ("shards", "samples", "share", "epochs"))
        table = Table("source", *columns, title=f"training data, {self.batch_size} samples per step, seed {self.seed}")
        for source, share in zip(sources, self._shares(), strict=True):
            epochs = "" if samples is None else f"{samples * share / len(source):.2f}"
            table.add_row(printable(source.name), str(len(source.indexes)), f"{len(source):,}", f"{share:.1%}", epochs)
        return table

    def bucket_table(self) -> Group | None:
        """The buckets of the training and their shares, which ``data.json`` has from now on; None without ``bucketing``."""
        if self.buckets is None or not isinstance(self.stream, BucketedOrder):
            return None
        rows, looked_at = self.buckets.shares(self._shares())
        self.ledger.buckets = [asdict(row) for row in rows]
        samples = sum(len(source) for source in self.open("train"))
        return bucket_table(rows, looked_at, samples, self.stream.bucket_size, self.stream.pure_groups(self.position()))

    def _shares(self) -> list[float]:
        """Shares of the sources in the training stream."""
        weighted = any(weight is not None for weight in self._weights().values())
        stream = self.stream.stream if isinstance(self.stream, BucketedOrder) else self.stream  # batches change no share
        # whole blocks: the exact shares
        counts = stream.counts(256 * BLOCK) if weighted else [len(source) for source in self.open("train")]
        return [count / sum(counts) for count in counts]

    def position(self) -> int:
        """Training samples consumed by the whole job, in whole optimiser steps."""
        return self._position.of(self.trainer)

    def on_before_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> RawBatch:
        """At the first training batch, tie the trainer's count of steps to the position."""
        if self.trainer is not None and self.trainer.training:
            self._position.begin(self.trainer)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order depends on."""
        self._write_ledger()
        return {"position": self.position(), "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; a ``UserError`` where the order of the samples is another one now."""
        was = {"bucketing": None, **state_dict["order"]}
        refuse_another_order({**was, "bucket_size": was.get("bucket_size")}, self._order(), "samples")
        self._position = TrainingPosition(self.batch_size, int(state_dict["position"]), resumed=True)

    def _order(self) -> dict[str, Any]:
        sources = {source.name: [len(source.indexes), len(source)] for source in self.open("train")}
        order = {"seed": self.seed, "window": self.window, "sources": sources, "weights": self._weights(), "bucketing": None}
        if self.bucketing is None or self.buckets is None:
            return order
        bucketing, measures = self.bucketing.to_json(self.transform), self.buckets.digest()
        sizes = {"batch_size": self.batch_size, "bucket_size": self.bucket_size or self.batch_size}
        return {**order, "bucketing": bucketing, **sizes, "sizes in the indexes": measures}

    def _deliver(self, raw: RawBatch, stage: str) -> RawBatch:
        known = len(self.ledger.skips), self.ledger.faults.total()
        try:
            return super()._deliver(raw, stage)
        finally:
            if (len(self.ledger.skips), self.ledger.faults.total()) != known:
                self._write_ledger()

    def _taken(self, raw: RawBatch, stage: str) -> RawBatch:
        """As in the base class; in training another sample takes the place of the last one, for a rank cannot step on nothing."""
        taken = super()._taken(raw, stage)
        if stage == "val" or taken.keys or not raw.keys:
            return taken
        [first] = self.stream.take(raw.rows[0].position, raw.rows[0].position + 1).tolist()
        for step in range(1, TRIES + 1):
            other = self._reader[BatchRequest([SamplePosition(-1, (first + step) % len(self._reader))])]
            if other.error is not None:
                raise other.error
            if (found := super()._taken(replace(other, skips=[]), stage)).keys:
                skips = [replace(skip, substitute=found.keys[0]) for skip in taken.skips]
                return replace(found, skips=skips, faults=taken.faults + found.faults, stands_in=True)
        bad = f"{TRIES} samples in a row that the method cannot use, the first because: {taken.skips[-1].reason}"
        raise UserError(f"data: {taken.skips[-1].shard}", bad, "a good one among them")

    def _write_ledger(self) -> None:
        if self.ledger.folder is None:
            return
        position, sources = self.position(), self.open("train")
        drawn = self.stream.counts(position)
        train = {source.name: (len(source), count) for source, count in zip(sources, drawn, strict=True)}
        self.ledger.write(position, train, {source.name: len(source) for source in self.open("val")})
