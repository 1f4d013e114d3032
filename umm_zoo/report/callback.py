"""Callback that keeps the page of a run up to date."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from umm_zoo.checkpoints.plain_files import write_json
from umm_zoo.errors import note
from umm_zoo.experiment.file import Experiment
from umm_zoo.method import Method
from umm_zoo.report.run_page import write_run_page
from umm_zoo.training.report import circumstances
from umm_zoo.training.run_folder import RunFolder


class RunPage(Callback):
    """Writes ``report.json``, what a folder does not tell otherwise, and after every validation ``report.html``; rank 0 alone.

    Every run has it, under the key ``page`` of its callbacks. A page that cannot be made is said, and the run goes on.

    Args:
        experiment: of the run.
        folder: of the run.
    """

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the command, the parts, the steps there will be, and where it runs."""
        if not trainer.is_global_zero:
            return
        line = ["python", "-m", "umm_zoo.fit", self.experiment.file, *self.experiment.overrides]
        parts = pl_module.all_parts().items() if isinstance(pl_module, Method) else ()
        made = circumstances()
        facts: dict[str, Any] = {
            "command": shlex.join(line),
            "max_steps": trainer.max_steps,
            "parts": [part_row(name, part) for name, part in parts],
            "machine": made["machine"],
            "versions": made["versions"],
        }
        write_json(RunFolder(self.folder).facts_file, facts, indent=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        if trainer.is_global_zero and not trainer.sanity_checking and trainer.state.fn is TrainerFn.FITTING:
            try:
                write_run_page(self.folder)
            except Exception as error:  # whatever it is, no page is worth the run
                note(f"{self.folder}: no page was written: {type(error).__name__}: {error}")


def part_row(name: str, part: nn.Module) -> dict[str, Any]:
    """Name, class and numbers of trained and frozen parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in part.parameters()]
    counts = {
        kind: sum(size for size, learns in sizes if learns is wanted) for kind, wanted in (("trained", True), ("frozen", False))
    }
    return {"name": name, "class": type(part).__name__, **counts}
