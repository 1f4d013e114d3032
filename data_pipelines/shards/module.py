"""Base of the data modules that read tar shards: their sources and sizes, this rank, and the ledger."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning import LightningDataModule

from data_pipelines.decoding import ImageTransform
from data_pipelines.shards.batches import RawBatch
from data_pipelines.shards.ledger import Ledger
from data_pipelines.shards.sources import ShardSource
from umm_zoo.errors import UserError

log = logging.getLogger(__name__)


class ShardModule(LightningDataModule):
    """Base class of ``ShardData`` and ``StreamData``, which say what its arguments mean."""

    def __init__(
        self,
        train: dict[str, ShardSource] | None,
        val: dict[str, ShardSource] | None,
        transform: ImageTransform,
        batch_size: int,
        val_batch_size: int,
        max_skips: int,
        seed: int,
    ) -> None:
        super().__init__()
        check_positive(image_size=transform.image_size, batch_size=batch_size, val_batch_size=val_batch_size)
        self.sources = {"train": dict(train or {}), "val": dict(val or {})}
        self.transform, self.batch_size, self.val_batch_size = transform, batch_size, val_batch_size
        self.seed, self.ledger = seed, Ledger(max_skips)

    def setup(self, stage: str) -> None:
        """Skips are written into the run folder from now on."""
        self.ledger.rank = self._ranks()[1]
        # the folder one stands in is no run folder
        if stage == "fit" and self.trainer is not None and os.path.abspath(self.trainer.default_root_dir) != os.getcwd():
            self.ledger.open(Path(self.trainer.default_root_dir))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Images become floats where they are wanted: bytes are a quarter of the way to a device."""
        return batch.batch() if isinstance(batch, RawBatch) else batch

    def _ranks(self) -> tuple[int, int]:
        """(number of data-parallel ranks, this rank)."""
        if self.trainer is None:
            return 1, 0
        share = self.trainer.distributed_sampler_kwargs  # knows of tensor parallelism, where several ranks read the same
        return (share["num_replicas"], share["rank"]) if share else (self.trainer.world_size, self.trainer.global_rank)

    def _accumulation(self) -> int:
        """Micro-batches per optimiser step."""
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    def _deliver(self, raw: RawBatch) -> None:
        """Take note of the skips of a raw batch."""
        for skip in raw.skips:
            if self.ledger.add(skip):
                log.warning("skipped %s%s", skip, f" (repeated {skip.substitute} instead)" if skip.substitute else "")


def check_positive(**sizes: int) -> None:
    """Refuse sizes of ``data`` below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"data.{name}", str(value), "a positive whole number")
