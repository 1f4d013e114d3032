"""Disk that keeps some ranks waiting, and is full for others."""

from __future__ import annotations

import threading
from typing import Any

from lightning import Callback

from umm_zoo.checkpoints import output
from umm_zoo.checkpoints.folder import CheckpointFolder


class Disk(Callback):
    """Lets rank 1 write nothing before step ``opens``, by when there is to be no checkpoint; full for it from ``full`` on."""

    def __init__(self, opens: int, full: int) -> None:
        self.opens, self.full, self.opened, self.put, self.step = opens, full, threading.Event(), output.put, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            output.put = self.write  # type: ignore[assignment]

    def write(self, file: Any, piece: memoryview) -> None:
        assert self.opened.wait(120)
        if self.step >= self.full:
            raise OSError(28, "No space left on device")
        self.put(file, piece)

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.step = trainer.global_step
        if self.step == self.opens:
            assert CheckpointFolder(f"{trainer.default_root_dir}/checkpoints").newest() is None
            trainer.strategy.barrier()  # seen by all
            self.opened.set()
