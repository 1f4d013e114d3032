"""Activation checkpointing by policy: ``training.checkpointing``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from umm_zoo.backbones.devices import local_rank
from umm_zoo.backbones.recomputing import recomputed
from umm_zoo.method import Method
from umm_zoo.training.compilation import blocks_of
from umm_zoo.training.memory import passed_parts

#: What ``auto`` tries, in this order: nothing computed again, every second layer, every layer.
CHOICES = (0, 2, 1)
#: Share of a device's memory that an estimate may take: it leaves out what libraries work with, and gaps (our choice).
_SHARE = 0.85


class _Recomputed:
    """Call of a layer that is computed again in the backward pass. ``nn.Module`` leaves it out of copies and files."""

    recomputes = True

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return recomputed(self.run, *args, **kwargs) if torch.is_grad_enabled() else self.run(*args, **kwargs)


def recompute(method: Method, every: int) -> None:
    """Let the 1st, (every + 1)-th … layer of each part that a gradient passes be computed again; 0 is none.

    It takes the place of what the parts say themselves (``gradient_checkpointing``). Parts without layers keep what they make.
    """
    for part in passed_parts(method).values():
        for module in part.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # type: ignore[assignment]
        layers = [block for block in blocks_of(part) if block is not part]
        for layer in layers[::every] if every else ():
            layer._compiled_call_impl = _Recomputed(layer._call_impl)


def fits(size: int) -> bool:
    """Whether an estimate of so many bytes is at home on this process's device."""
    return size <= _SHARE * device_bytes()


def device_bytes() -> int:
    """Memory of this process's GPU, or of the machine where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(local_rank() % torch.cuda.device_count()).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_words(every: int) -> str:
    """Which layers are computed again."""
    return {0: "no layer", 1: "every layer", 2: "every second layer"}.get(every, f"one of {every} layers")
