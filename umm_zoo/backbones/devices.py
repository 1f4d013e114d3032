"""The device of this process among those of its node."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def local_rank() -> int:
    """Number of this process on its node, as torchrun, Lightning or srun tell it."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def own_device() -> str:
    """The GPU of this process, which CUDA takes for the current one from now on, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(local_rank() % torch.cuda.device_count())  # a job may see its own GPU alone
    return f"cuda:{torch.cuda.current_device()}"


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device has to do before; ``values`` must not change then."""
    device = torch.device(device)
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # only from page-locked memory does a copy not wait
    return values.to(device, non_blocking=True)
