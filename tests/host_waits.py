"""Training steps on a device that cannot be read, where whatever a host would wait for on a GPU raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from umm_zoo.batch import Batch
from umm_zoo.method import Method


class BlockingCopies(TorchDispatchMode):
    """Mode that refuses copies from the host to the ``meta`` device for which a GPU would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        there = torch.device(kwargs.get("device") or "cpu").type == "meta" and args and isinstance(args[0], Tensor)
        if there and not args[0].is_meta and func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            raise RuntimeError(f"a copy of {list(args[0].shape)} to the device that waits for it")
        return func(*args, **kwargs)


def step_unread(method: Method, batch: Batch) -> None:
    """A training step, forwards and backwards, on the ``meta`` device.

    Numbers, tests of truth, places where a mask holds, and copies to the host raise in torch itself: there is nothing to be read.
    What the host makes of a batch's texts and sizes is on the host, and has numbers.

    Raises:
        RuntimeError, NotImplementedError: something was to be read, or was sent so that the host waits.
    """
    method.to("meta").train()
    batch = batch.to("meta")
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.autocast", lambda *args, **kwargs: nullcontext()))  # there is none of on ``meta``
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
            stack.enter_context(mock.patch.object(owner, name, _sends_nothing(getattr(owner, name))))
        stack.enter_context(BlockingCopies())
        method.training_losses(batch)["loss"].backward()


def _sends_nothing(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors of numbers, refused on the ``meta`` device; modes do not see it."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.is_meta and tensor.numel() and not isinstance(args[-1], Tensor):
            raise RuntimeError(f"numbers of shape {list(tensor.shape)} sent to the device, for which the host waits")
        return tensor

    return made


@contextmanager
def unsynchronised() -> Iterator[None]:
    """The time in which torch raises wherever the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
