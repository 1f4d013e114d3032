"""``StreamData``: shards without an index, for data that is read once, or that cannot be indexed.

Nothing is known of such a shard but its bytes, so the order is a shuffle within a buffer, shards are what ranks and workers share
out, and a resume is approximate. ``python -m data_pipelines.index`` makes an index, with which ``ShardData`` is exact.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from torch.utils.data import DataLoader

from data_pipelines.decoding import ImageTransform, Resize, Square
from data_pipelines.shards.addresses import expand
from data_pipelines.shards.batches import RawBatch
from data_pipelines.shards.loading import BatchLoader
from data_pipelines.shards.module import ShardModule, check_positive
from data_pipelines.shards.sources import ShardSource, in_data
from data_pipelines.shards.stream import Progress, ShardStream, StreamedBatch
from umm_zoo.errors import UserError

log = logging.getLogger(__name__)

NOTE = (
    "data: these shards are streamed without an index: samples are shuffled within a buffer, and a resume is approximate (it goes "
    "on with whole shards; some samples come again); `python -m data_pipelines.index SHARD…` and ShardData make both exact"
)


@cache
def _note_once() -> None:
    log.warning(NOTE)


class StreamData(ShardModule):
    """Training and validation batches from tar shards without an index; see ``ShardData`` for those that have one.

    Sources are read together, each shard once per epoch; a weight is refused. Ranks and workers share out whole shards, and a
    stream without a shard is refused. The next sample is drawn from a ``buffer`` of so many; all else is as in ``ShardData``.
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
        sizes = ImageTransform(image_size, target_size or image_size, resize or Square())
        super().__init__(train, val, sizes, batch_size=batch_size, val_batch_size=val_batch_size, max_skips=max_skips, seed=seed)
        check_positive(buffer=buffer)
        for name, source in self.sources["train"].items():
            if source.weight is not None:
                raise UserError(f"data.train.{name}.weight", str(source.weight), "none for streamed sources (index them)")
        self.num_workers, self.buffer, self._start = num_workers, buffer, Progress()
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

    def train_dataloader(self) -> BatchLoader[StreamedBatch]:
        """Endless batches, from where a checkpoint got to."""
        if not self.sources["train"]:
            raise UserError("data.train", "no source", "at least one to train on")
        _note_once()
        shares = self._ranks()[0] * self._accumulation()
        if self.batch_size % shares:
            raise UserError("data.batch_size", str(self.batch_size), f"a multiple of {shares} (ranks, micro-batches)")
        return self._loader("train", self.batch_size // shares, self.num_workers)

    def val_dataloader(self) -> BatchLoader[StreamedBatch] | list[Any]:
        """Every validation sample once, by one rank; an empty list where there is no source."""
        # few validation shards must not be too few for the workers
        return self._loader("val", self.val_batch_size, workers=0) if self.sources["val"] else []

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its shards every stream of this rank has delivered."""
        least = min(self._reached.values()) if len(self._reached) >= max(1, self.num_workers) else self._start
        return least._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the first shards that were not delivered whole."""
        self._start, self._reached = Progress(int(state_dict["epoch"]), int(state_dict["shards"])), {}

    def _loader(self, stage: str, batch_size: int, workers: int) -> BatchLoader[StreamedBatch]:
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
        stream = ShardStream(stage, shards, sources, self.transform, batch_size, ranks, self.seed, self.buffer, start)
        return BatchLoader(DataLoader(stream, batch_size=None, num_workers=workers), self._deliver)

    def _shards(self, stage: str) -> list[tuple[str, str]]:
        with in_data():
            return [(name, path) for name, source in self.sources[stage].items() for path in expand(source.shards)]

    def _deliver(self, raw: RawBatch) -> None:
        super()._deliver(raw)
        if isinstance(raw, StreamedBatch) and raw.progress is not None:
            self._reached[raw.worker] = raw.progress
