"""Base of the data modules that read tar shards: their arguments, this rank, and the ledger."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Interval
from lightning import LightningDataModule

from data_pipelines.shards.batches import RawBatch
from data_pipelines.shards.ledger import Ledger, Skip
from data_pipelines.shards.order import rank_slice
from data_pipelines.shards.remote import take_faults
from data_pipelines.shards.sources import ShardSource
from data_pipelines.transforms.image_transform import ImageTransform
from data_pipelines.transforms.resize import Resize, Square
from umm_zoo.backbones.preparation import Preparation, Prepares
from umm_zoo.errors import Natural, UserError, printable
from umm_zoo.method import Method
from umm_zoo.outputs import RefusesRows

Pixels = Annotated[int, Interval(ge=1, le=16384)]
Rows = Annotated[int, Interval(ge=1, le=2**20)]

log = logging.getLogger(__name__)


# without postponed annotations: those of inherited fields are read where the names of this module are not known
@dataclass(eq=False, repr=False)
class ShardModule(LightningDataModule):
    """Base class of ``ShardData`` and ``StreamData``.

    Args:
        train, val: sources by name; those of validation are read one after the other, each sample once.
        image_size: edge of input images, or of a square with as many pixels as one may have, see ``resize``; to be given by name.
        batch_size: global batch, per optimiser step.
        val_batch_size: per rank.
        num_workers: processes that read and decode ahead, per rank.
        max_skips: bad samples of a rank and stage after which the run stops. A shard that cannot be used, or with damage between
            its samples, counts as one more; where a source has no usable shard the run does not begin.
        seed: chooses the order.
        resize: what input images are brought to, see ``data_pipelines.transforms``; None cuts out the centre square.
        target_size: the same as ``image_size`` for images to generate, and it where None.
        target_resize: the same as ``resize`` for images to generate, and it where None.

    Raises:
        UserError: a size is not positive; later a shard that is missing, empty, truncated, or not what its index says.
    """

    endless: ClassVar[bool] = True  # as a training stream: arguments of a trainer that count epochs are refused

    train: dict[str, ShardSource] | None = None
    val: dict[str, ShardSource] | None = None
    image_size: Pixels = field(kw_only=True)
    batch_size: Rows = 64
    val_batch_size: Rows = 64
    num_workers: Annotated[int, Interval(ge=0, le=1024)] = 0
    max_skips: Natural = 100
    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)] = 0
    resize: Resize | None = None
    target_size: Pixels | None = None
    target_resize: Resize | None = None

    def __post_init__(self) -> None:
        super().__init__()
        check_positive(image_size=self.image_size, batch_size=self.batch_size, val_batch_size=self.val_batch_size)
        self.sources = {"train": dict(self.train or {}), "val": dict(self.val or {})}
        target_size, resize = self.target_size or self.image_size, self.resize or Square()
        self.transform = ImageTransform(self.image_size, target_size, resize, self.target_resize)
        self.ledger = Ledger(self.max_skips)
        self._preparations: dict[str, Preparation | None] = {}

    def check_shares(self, num_ranks: int, accumulation: int) -> None:
        """Refuse a batch that so many ranks and micro-batches cannot share out evenly."""
        rank_slice(self.batch_size, accumulation, 0, num_ranks, 0)

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

    def _pinned(self) -> bool:
        """Whether batches go to CUDA, which copies from page-locked memory while the processor goes on."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _accumulation(self) -> int:
        """Micro-batches per optimiser step."""
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    def _deliver(self, raw: RawBatch, stage: str) -> RawBatch:
        """The rows of a raw batch that the method takes, after taking note of skips, and of faults on the way to it."""
        if raw.prepared is not None and (prepare := self._preparations[stage]) is not None:
            prepare.take(raw.prepared)
        raw = self._taken(raw, stage)
        self.ledger.count(raw.faults + take_faults())
        for skip in raw.skips:
            self._note(skip)
        return raw

    def _preparation(self, stage: str) -> Preparation | None:
        """What the method has prepared of the batches of ``train`` or ``val``."""
        method = None if self.trainer is None else self.trainer.lightning_module
        prepare = method.preparation(scoring=stage == "val") if isinstance(method, Prepares) else None
        self._preparations[stage] = prepare
        return prepare

    def _note(self, skip: Skip) -> None:
        if self.ledger.add(skip):
            repeated = f" (repeated {skip.substitute} instead)" if skip.substitute else ""
            log.warning("skipped %s", printable(f"{skip}{repeated}"))

    def _taken(self, raw: RawBatch, stage: str) -> RawBatch:
        """Without the rows that the method refuses, such as those that are too long for it; they are skips like damaged ones.

        Rows that ask for an image beside others are a ``UserError`` where the method takes no such batch, and in validation, for
        metrics could not tell whose outputs they see.
        """
        method = self.trainer.lightning_module if self.trainer is not None else None
        if isinstance(method, Method) and not method.takes_mixed:
            raw.refuse_mixed("sources of both kinds cannot be mixed in one run (train them in turn, with after:)")
        elif isinstance(method, Method) and stage == "val":
            raw.refuse_mixed("give each kind a source of its own in data.val")
        while isinstance(method, RefusesRows) and raw.keys:
            try:
                method.check_rows(raw.outlines(), scoring=stage == "val")
                break
            except UserError as error:
                if error.row is None:
                    raise
                skip = replace(raw.rows[error.row], reason="; ".join(str(problem) for problem in error.problems))
                raw = replace(raw.without({error.row}), skips=[*raw.skips, skip])
        return raw


def check_positive(**sizes: int) -> None:
    """Refuse sizes of ``data`` below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"data.{name}", str(value), "a positive whole number")


def refuse_another_order(was: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Refuse to go on from a checkpoint where its position means something else now.

    Args:
        was: what the order depended on, by name.
        now: what it depends on.
        what: is ordered.
    """
    for name, before in was.items():
        if now.get(name) != before:
            found = f"this checkpoint was made with {name} {before}, found {now.get(name)}; the order of {what} would change"
            raise UserError("data", found, hint="restore the old value, or start a new run from the old weights with after:")
