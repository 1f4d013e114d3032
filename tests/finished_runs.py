"""Run folders as a training leaves them, without the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from umm_zoo.experiment.build import build_method
from umm_zoo.experiment.file import use_folders


def write_run(
    folder: Path, method: dict[str, Any], image_size: int = 8, folders: tuple[str, ...] = (), **more: dict[str, Any]
) -> Path:
    """The run folder of a method as its node is built from seed 0; ``folders`` hold classes of it, ``more`` are maps beside it."""
    use_folders(folders)
    torch.manual_seed(0)
    experiment = {
        "name": "toy",
        "method": method,
        "training": {"trained": [], "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 1e-3}},
        "data": {"_target_": "data_pipelines.shards.data.ShardData", "image_size": image_size},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
        **more,
    }
    state = {
        "state_dict": build_method(experiment).state_dict(),
        "experiment": experiment,
        "folders": list(folders),
        "global_step": 1,
    }
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(state, folder / "checkpoints" / "last.ckpt")
    return folder
