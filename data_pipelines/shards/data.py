"""``ShardData``: tar shards as a Lightning data module whose order of samples survives anything."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, Trainer
from rich.console import Console
from rich.table import Table

from data_pipelines.decoding import Resize, Square
from data_pipelines.shards.addresses import expand
from data_pipelines.shards.cache import ShardCache
from data_pipelines.shards.index import build_index, load_indexes
from data_pipelines.shards.ledger import Ledger, Skip, SourceCount
from data_pipelines.shards.loading import BatchLoader, EndlessSlots, SequentialSlots, SizedBatchLoader
from data_pipelines.shards.mixing import BLOCK, ExhaustiveMixture, WeightedMixture
from data_pipelines.shards.order import ShardOrder, Stream
from data_pipelines.shards.reading import OpenSource, SampleReader, Shipment
from data_pipelines.shards.stored import StoredOutputs, any_stored, find_stored
from data_pipelines.tasks import Conversations, Task
from umm_zoo.batch import Batch
from umm_zoo.errors import MistakeError
from umm_zoo.method import Method

log = logging.getLogger(__name__)


class ShardSource:
    """Shards of one kind and what their samples mean. Nothing is opened before the run starts.

    Args:
        shards: a folder, a glob, a ``{000..015}`` range, an http(s), s3 or gs address, or a list of these.
        task: turns raw members into a sample.
        weight: share of the training stream among the sources (any scale). None, for every source, mixes by size: every sample of
            every source exactly once per epoch.
    """

    def __init__(self, shards: str | Sequence[str], task: Task | None = None, weight: float | None = None) -> None:
        self.shards: str | list[str] = shards if isinstance(shards, str) else list(shards)
        self.task = task if task is not None else Conversations()
        if weight is not None and weight < 0:
            raise ValueError(f"weight: found {weight}, expected numbers from 0 on")
        self.weight = weight

    def open(self, name: str) -> OpenSource:
        """Find the shards and read their indexes (making those that are missing).

        Raises:
            FileNotFoundError: no shard is there.
            ValueError: a shard is empty, truncated, or not what its index says.
        """
        return OpenSource(name, self.task, load_indexes(expand(self.shards)))


class ShardData(LightningDataModule):
    """Training and validation batches from indexed tar shards.

    The training stream is endless and a pure function of (sources, seed, window): global batch ``k`` is the same list of samples
    for any number of ranks, workers and micro-batches. A checkpoint holds the number of samples consumed, and resuming costs the
    same at any position. ``batch_size`` counts the samples of one optimiser step over all ranks and micro-batches.

    A sample that cannot be used is recorded with shard, key and reason, and its batch is smaller by it.

    Args:
        train: training sources by name.
        val: validation sources by name, read one after the other, each sample once.
        image_size: edge of input images.
        batch_size: global batch, per optimiser step.
        val_batch_size: per rank.
        num_workers: processes that read and decode ahead, per rank.
        window: shards whose samples are shuffled together; 0 does not shuffle.
        max_skips: bad samples after which the run stops.
        seed: chooses the order.
        resize: how images become square.
        target_size: edge of images to be drawn; ``image_size`` where None.
        cache: folder on a local disk in which whole remote shards are kept, shared by all processes of the machine; None reads each
            sample by range requests.
        cache_gb: most that ``cache`` may hold; shards used longest ago make room.
        precomputed: where the outputs of frozen parts lie that ``data_pipelines.precompute`` stored: ``beside`` the shards, a
            folder, or ``ignore`` to compute them in training. Used where they are there; refused where they are stale.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        train: dict[str, ShardSource] | None = None,
        val: dict[str, ShardSource] | None = None,
        image_size: int = 32,
        batch_size: int = 64,
        val_batch_size: int = 64,
        num_workers: int = 0,
        window: int = 16,
        max_skips: int = 100,
        seed: int = 0,
        resize: Resize | None = None,
        target_size: int | None = None,
        cache: str | None = None,
        cache_gb: float = 100.0,
        precomputed: str = "beside",
    ) -> None:
        super().__init__()
        for name, value in (("image_size", image_size), ("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value < 1:
                raise ValueError(f"data.{name}: found {value}, expected positive whole numbers")
        self.train_sources, self.val_sources = dict(train or {}), dict(val or {})
        self.image_size, self.target_size = image_size, target_size or image_size
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self.window, self.seed = window, seed
        self.resize = resize if resize is not None else Square()
        self.precomputed = precomputed
        self.cache = None if cache is None else ShardCache(cache, cache_gb)
        self.ledger = Ledger(max_skips)
        self._folder: Path | None = None
        self._train: list[OpenSource] | None = None
        self._val: list[OpenSource] | None = None
        self._stream: Stream | None = None
        self._start = 0  # position at which this run began or was resumed
        self._first_step: int | None = None  # the trainer's count of steps at that position, known from the first batch on
        self._resumed = False

    # -- opening -------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Find and open every shard now, so that what is missing or damaged is said before a model is built.

        Raises:
            FileNotFoundError: no shard is there.
            ValueError: a shard is empty, truncated, or not what its index says.
        """
        self._open_train()
        self._open_val()

    def ledger_to(self, folder: str | Path) -> None:
        """Write ``data.json`` into this folder (the run folder)."""
        self._folder = Path(folder)

    def prepare_data(self) -> None:
        """Make missing indexes, in one process only. A run that is only scored needs its validation shards alone."""
        training = self.trainer is None or self.trainer.state.fn == "fit"
        for source in [*(self.train_sources.values() if training else ()), *self.val_sources.values()]:
            for path in expand(source.shards):
                build_index(path)

    def setup(self, stage: str) -> None:
        """Open the shards; a fit starts at position 0 unless a checkpoint is loaded after this."""
        if stage == "fit":
            self._start, self._first_step, self._resumed = 0, None, False
            self._open_train()
        self._open_val()
        self.ledger.rank = self._ranks()[1]
        if (folder := self._ledger_folder()) is not None and stage == "fit":
            self.ledger.open(folder)

    def teardown(self, stage: str) -> None:
        """Write the ledger a last time."""
        if stage == "fit":
            self._write_ledger()

    def _open_train(self) -> list[OpenSource]:
        if self._train is None:
            if not self.train_sources:
                raise ValueError("data.train: found no source, training needs at least one")
            self._train = [source.open(name) for name, source in self.train_sources.items()]
            self._stream = make_stream(self._train, [s.weight for s in self.train_sources.values()], self.seed, self.window)
        return self._train

    def _open_val(self) -> list[OpenSource]:
        if self._val is None:
            self._val = [source.open(name) for name, source in self.val_sources.items()]
        return self._val

    @property
    def stream(self) -> Stream:
        """The order of the training samples."""
        self._open_train()
        assert self._stream is not None
        return self._stream

    # -- loaders -------------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> BatchLoader:
        """Endless batches from the current position on.

        Raises:
            ValueError: ``batch_size`` cannot be shared out evenly.
        """
        sources = self._open_train()
        num_ranks, rank = self._ranks()
        accumulation = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        slots = EndlessSlots(self.stream, self.position, self.batch_size, accumulation, num_ranks, rank)
        if not self._resumed and self._first_step is None:
            self.ledger.start_afresh(num_ranks)
        if rank == 0 and self.trainer is not None:
            steps = self.trainer.max_steps
            Console(stderr=True).print(self.table(steps * self.batch_size if steps > 0 else None))
            self._write_ledger()
        reader = self.reader("train", sources)
        return BatchLoader(reader, slots, self.num_workers, self._on_skip, packed=self.trainer is not None)

    def val_dataloader(self) -> SizedBatchLoader | list[Any]:
        """Every validation sample once, shared out over the ranks; an empty list where there is no source."""
        sources = self._open_val()
        if not sources:
            return []
        num_ranks, rank = self._ranks()
        slots = SequentialSlots([len(source) for source in sources], self.val_batch_size, num_ranks, rank)
        reader = self.reader("val", sources)
        return SizedBatchLoader(reader, slots, self.num_workers, self._on_skip, packed=self.trainer is not None)

    def reader(self, stage: str, sources: Sequence[OpenSource]) -> SampleReader:
        """Reads the samples of opened sources at this module's sizes."""
        substitute = stage == "train"
        stored = self._stored(stage, sources)
        return SampleReader(stage, sources, self.image_size, self.target_size, self.resize, substitute, self.cache, stored)

    def transform(self) -> dict[str, Any]:
        """What happens to an image on its way into a batch, in plain values."""
        resize = {name: str(value) for name, value in sorted(vars(self.resize).items())}
        return {"image_size": self.image_size, "target_size": self.target_size, "resize": [type(self.resize).__name__, resize]}

    def stored_folder(self) -> str | None:
        """The folder of stored outputs; None is beside each shard."""
        return None if self.precomputed in ("beside", "ignore") else self.precomputed

    def _stored(self, stage: str, sources: Sequence[OpenSource]) -> list[StoredOutputs]:
        """Stored outputs of the method's frozen parts, looked for when a loader is made: only then a resume has its weights."""
        method = None if self.trainer is None else self.trainer.lightning_module
        if self.precomputed == "ignore" or not isinstance(method, Method):
            return []
        named = {name for source in sources for name in source.task.extras}
        indexes = [index for source in sources for index in source.indexes]
        found = [
            find_stored(name, item.fingerprint(self.transform()), indexes, self.stored_folder())
            for name, item in method.precomputable().items()
            if name not in named and any_stored(name, indexes, self.stored_folder())
        ]
        callbacks = self.trainer.callbacks if isinstance(self.trainer, Trainer) else []  # type: ignore[attr-defined]
        changing = [type(callback).__name__ for callback in callbacks if getattr(callback, "changes_images", False)]
        if any(found) and changing and stage == "train":
            raise MistakeError(
                f"callbacks: found {changing[0]}, which changes the images, and stored outputs of the unchanged ones; "
                "data.precomputed=ignore computes them in training instead"
            )
        return [kept for kept in found if kept is not None]

    def table(self, samples: int | None = None) -> Table:
        """Sizes and weights of the training sources, and the epochs that ``samples`` samples of the whole stream make."""
        sources = self._open_train()
        many = 256 * BLOCK  # whole blocks: the exact shares
        shares = [count / many for count in self.stream.counts(many)] if self._weighted() else _by_size(sources)
        table = Table(title=f"training data, {self.batch_size} samples per step, seed {self.seed}")
        for column in ("source", "shards", "samples", "share", "epochs"):
            table.add_column(column, justify="left" if column == "source" else "right")
        for source, share in zip(sources, shares, strict=True):
            epochs = "" if samples is None else f"{samples * share / len(source):.2f}"
            table.add_row(source.name, str(len(source.indexes)), f"{len(source):,}", f"{share:.1%}", epochs)
        return table

    def _weighted(self) -> bool:
        return any(source.weight is not None for source in self.train_sources.values())

    def _ranks(self) -> tuple[int, int]:
        """(number of data-parallel ranks, this rank)."""
        if self.trainer is None:
            return 1, 0
        share = self.trainer.distributed_sampler_kwargs  # knows of tensor parallelism, where several ranks read the same
        return (share["num_replicas"], share["rank"]) if share else (self.trainer.world_size, self.trainer.global_rank)

    # -- position ------------------------------------------------------------------------------------------------------------

    def position(self) -> int:
        """Training samples consumed by the whole job, in whole optimiser steps.

        Counted from the trainer's steps and not from batches loaded: workers read ahead of what is trained on, and half an
        accumulated step is done again after a resume.
        """
        if self._first_step is None or self.trainer is None:
            return self._start
        return self._start + (_steps(self.trainer) - self._first_step) * self.batch_size

    def on_before_batch_transfer(self, batch: Shipment, dataloader_idx: int) -> Shipment:
        """At the first training batch, tie the trainer's count of steps to the position."""
        if self._first_step is None and self.trainer is not None and self.trainer.training:
            self._first_step = _steps(self.trainer)
            _start_of_step(self.trainer)
        return batch

    def on_after_batch_transfer(self, batch: Shipment, dataloader_idx: int) -> Batch:
        """Images become floats where they are wanted: bytes are a quarter of the way to a device."""
        return batch.batch()

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order depends on."""
        self._write_ledger()
        return {"position": self.position(), "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the order of the samples is another one now, so "go on" has no meaning.
        """
        now = self._order()
        for name, was in state_dict["order"].items():
            if now.get(name) != was:
                raise ValueError(
                    f"data: this checkpoint was made with {name} {was}, found {now.get(name)}; the order of samples would change; "
                    "restore the old value, or start a new run from the old weights with after:"
                )
        self._start, self._first_step, self._resumed = int(state_dict["position"]), None, True

    def _order(self) -> dict[str, Any]:
        sources = self._open_train()
        return {
            "seed": self.seed,
            "window": self.window,
            "sources": {source.name: [len(source.indexes), len(source)] for source in sources},
            "weights": {name: source.weight for name, source in self.train_sources.items()},
        }

    # -- ledger --------------------------------------------------------------------------------------------------------------

    def _ledger_folder(self) -> Path | None:
        if self._folder is not None or self.trainer is None:
            return self._folder
        root = self.trainer.default_root_dir
        return None if os.path.abspath(root) == os.getcwd() else Path(root)  # the folder one stands in is no run folder

    def _on_skip(self, skip: Skip) -> None:
        if self.ledger.add(skip):
            log.warning("skipped %s%s", skip, f" (repeated {skip.substitute} instead)" if skip.substitute else "")
            self._write_ledger()

    def _write_ledger(self) -> None:
        if self._train is None or self.ledger.folder is None:
            return
        position = self.position()
        drawn = self.stream.counts(position)
        train = {source.name: SourceCount(len(source), count) for source, count in zip(self._train, drawn, strict=True)}
        self.ledger.write(position, train, {source.name: len(source) for source in self._open_val()})


def make_stream(sources: Sequence[OpenSource], weights: Sequence[float | None], seed: int, window: int) -> Stream:
    """The training stream of some sources.

    Raises:
        ValueError: some sources have a weight and others none.
    """
    sizes = [source.sizes for source in sources]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        missing = [source.name for source, weight in zip(sources, weights, strict=True) if weight is None]
        raise ValueError(f"data.train: sources {missing} have no weight while others have; give all of them one, or none")
    if len(sources) == 1:
        return ShardOrder(sizes[0], seed, window)
    return WeightedMixture(sizes, given, seed, window) if given else ExhaustiveMixture(sizes, seed, window)


def _by_size(sources: Sequence[OpenSource]) -> list[float]:
    total = sum(len(source) for source in sources)
    return [len(source) / total for source in sources]


def _steps(trainer: Trainer) -> int:
    """Global batches consumed so far: optimiser steps, or training steps where a method steps its optimisers itself."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def _start_of_step(trainer: Trainer) -> None:
    """Let the trainer count micro-batches from the start of an optimiser step.

    A checkpoint counts micro-batches. Resumed with another ``accumulate_grad_batches``, or from the middle of a step, the trainer
    would otherwise close its first step after too few of them.
    """
    loop = trainer.fit_loop.epoch_loop
    over = loop.batch_progress.current.ready % trainer.accumulate_grad_batches
    if over:
        for counter in (loop.batch_progress.current, loop.batch_progress.total):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counter, name, max(0, getattr(counter, name) - over))
        loop._batches_that_stepped = _steps(trainer)


__all__ = ["ShardData", "ShardSource", "make_stream"]
