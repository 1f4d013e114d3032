"""Record of a finished run: scores, costs, and the circumstances of the measurement."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from umm_zoo.experiment.sources import commit_of_package
from umm_zoo.training.log_file import NAME, read_log
from umm_zoo.training.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning import Trainer


def results(trainer: Trainer, folder: RunFolder) -> dict[str, Any]:
    """Steps, scores and costs of a training that has come to its end, and the circumstances."""
    return {
        "steps": trainer.global_step,
        "processes": trainer.world_size,
        **recorded(scores(trainer)),
        "costs": _costs(trainer, folder),
        **circumstances(),
    }


def scores(trainer: Trainer) -> dict[str, float]:
    """Everything logged last by its name, and NaN for each metric that counted no row."""
    from umm_zoo.callbacks.metrics import MetricCallback

    values: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        values |= callback.unscored() if isinstance(callback, MetricCallback) else {}
    return dict(sorted((values | {name: float(value) for name, value in trainer.callback_metrics.items()}).items()))


def recorded(values: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Scores as they are recorded: null for what is no finite number, which JSON does not have, and under ``notes`` what it was."""
    odd = {name: value for name, value in values.items() if not math.isfinite(value)}
    notes = {name: "nan: no row was counted" if math.isnan(value) else str(value) for name, value in odd.items()}
    metrics = {name: None if name in odd else value for name, value in values.items()}
    return {"metrics": metrics, **({"notes": notes} if notes else {})}


def _costs(trainer: Trainer, folder: RunFolder) -> dict[str, float]:
    """Size and price of the method: parameters, and where a ``Throughput`` callback watched, the median step and peak memory."""
    parameters = list(trainer.lightning_module.parameters())
    costs = {
        "parameters": float(sum(p.numel() for p in parameters)),
        "trained_parameters": float(sum(p.numel() for p in parameters if p.requires_grad)),
    }
    rows = [row for _, row in read_log(folder.logs / NAME).rows]
    steps = [float(row["throughput/step_ms"]) for row in rows if row.get("throughput/step_ms")]
    peaks = [float(row["throughput/peak_memory_gb"]) for row in rows if row.get("throughput/peak_memory_gb")]
    if steps and peaks:  # from the log: a resumed run with no step left to do has measured nothing itself
        costs["seconds_per_step"] = statistics.median(steps) / 1000
        costs["peak_memory_bytes"] = max(peaks) * 1e9
    return costs


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "lightning", "transformers", "diffusers", "torchmetrics", "umm_zoo"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def circumstances() -> dict[str, Any]:
    """Commit, library versions and machine, as ``metrics.json`` records them."""
    import torch

    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"commit": commit_of_package(), "versions": dict(_versions()), "machine": machine}
