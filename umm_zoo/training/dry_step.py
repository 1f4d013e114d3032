"""Estimate of the memory that a training step takes beside weights and moments: the step itself, of shapes alone.

The method takes its step, forwards and backwards, on the ``meta`` device: of floats only the shapes are computed, while integers
and truth values, on which the shapes depend, are computed for good. All that lives at once is added up as it comes and goes, so
what autograd keeps, gradient checkpointing, and what a backward pass needs on the way are in it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from umm_zoo.batch import Batch
from umm_zoo.method import Method

#: Seconds after which a step is given up, such as one of rollouts of thousands of tokens.
PATIENCE = 30.0
_META = torch.device("meta")


class TooLongError(RuntimeError):
    """The step would take more than ``PATIENCE``."""


def try_step(method: Method, data: Any, rows: int, precision: str) -> int:
    """See ``step_bytes``, for the first ``rows`` rows of the training data; 0 where there is none, or nothing can be said.

    Args:
        method: on the ``meta`` device; its weights get the dtype of a ``precision`` of 16 bits.
        data: the data module.
        rows: of a micro-batch of one process.
        precision: of the trainer. What autocast leaves in 32 bits is counted in 16.
    """
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    try:
        data.num_workers = 0
        batch = next(iter(data.train_dataloader()))
        if not isinstance(batch, Batch):
            return 0
        batch = batch.select(range(min(rows, len(batch))))
        if dtype != torch.float32:
            method.to(dtype)
            batch = batch._map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return step_bytes(method, batch) * rows // len(batch)
    except Exception:
        return 0


def step_bytes(method: Method, batch: Batch) -> int:
    """Most bytes that live at once in a training step on ``batch``, beside weights, gradients and the optimiser's moments.

    The gradients of the step before are there while this one goes forward, as they are in training.

    Args:
        method: on the ``meta`` device.
        batch: of one micro-batch of one process, on any device.

    Raises:
        Exception: whatever the method raises where it cannot step on it without numbers.
    """
    trained = [p for p in method.parameters() if p.requires_grad]
    batch = batch.to(_META)
    there = [*method.parameters(), *method.buffers(), *batch.images, *batch.requested]
    with _Shapes(there) as live, _standing_in():
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        loss = method.training_losses(batch)["loss"]
        for parameter in trained:
            parameter.grad = None
        loss.backward()
    for parameter in trained:
        parameter.grad = None
    return max(0, live.most - sum(p.numel() * p.element_size() for p in trained))


class _Shapes(TorchDispatchMode):
    """Mode in which tensors of floats on the ``meta`` device have shapes, and all others numbers; counts the bytes of the former.

    What would be read off floats, such as the likeliest token, is zero.

    Args:
        there: tensors that are not counted.
    """

    def __init__(self, there: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}
        self._end = time.monotonic() + PATIENCE

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if time.monotonic() > self._end:
            raise TooLongError(f"more than {PATIENCE:.0f} seconds")
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and given[0].is_meta:
            return 0.0 if given[0].is_floating_point() else 0
        floats = any(tensor.is_meta for tensor in given)
        if not floats and torch.device(kwargs.get("device") or "cpu") == _META and not self._of_floats(func, args, kwargs):
            kwargs["device"] = torch.device("cpu")  # integers have numbers
        elif floats:
            args, kwargs = tree_map_only(Tensor, self._shape_of, (self._places(func, args), kwargs))
        return self._counted(func(*args, **kwargs))

    @staticmethod
    def _of_floats(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether what is made without a tensor of floats on ``meta`` has floats."""
        if (dtype := kwargs.get("dtype")) is not None:
            return bool(dtype.is_floating_point)
        if args and isinstance(args[0], Tensor):
            return args[0].is_floating_point()
        return func.overloadpacket is not torch.ops.aten.arange or any(isinstance(value, float) for value in args)

    @staticmethod
    def _shape_of(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)

    @staticmethod
    def _places(func: Any, args: Sequence[Any]) -> Sequence[Any]:
        """Truth values as indices are the places where they hold, whose number is known from them alone."""
        if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
            return args
        indices: list[Any] = []
        for index in args[1]:
            holds = isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta
            indices += index.nonzero().unbind(dim=1) if holds else [index]
        return [args[0], indices, *args[2:]]

    def _counted(self, made: Any) -> Any:
        def count(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return tensor
            if not tensor.is_floating_point() and not tensor.is_complex():
                return torch.zeros(tensor.shape, dtype=tensor.dtype)
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self._known:
                self._known.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
            return tensor

        return tree_map_only(Tensor, count, made)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    """``torch.autocast``, which there is none of on ``meta``: a block that switches it off there would be refused."""
    return nullcontext() if device_type == "meta" else torch.amp.autocast(device_type, *args, **kwargs)


def _numbers(data: Any, *, make: Callable[..., Tensor] = torch.tensor, **kwargs: Any) -> Tensor:
    """``torch.tensor``, whose integers keep their numbers: on ``meta`` they would have none."""
    made = make(data, **kwargs)
    if not made.is_meta or made.is_floating_point():
        return made
    return make(data, **{**kwargs, "device": "cpu"})


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
    **kwargs: Any,
) -> Tensor:
    """Attention that keeps no matrix of weights, as its kernels on CPUs and GPUs do; on ``meta`` it would."""
    if not query.is_meta or query.ndim != 4 or (attn_mask is not None and attn_mask.requires_grad):
        return attend(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    if (groups := query.shape[-3] // key.shape[-3]) > 1:
        key, value = (tensor.repeat_interleave(groups, dim=-3) for tensor in (key, value))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return cast(Tensor, fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0])


#: What stands in for functions of torch during the step, in its backward pass too, where a mode of functions would not be.
_STAND_INS: tuple[tuple[Any, str, Any], ...] = (
    (torch, "autocast", _autocast),
    (torch, "tensor", _numbers),
    (F, "scaled_dot_product_attention", _attention),
)


@contextmanager
def _standing_in() -> Iterator[None]:
    """For a time, torch with what stands in for some of its functions."""
    own = [(owner, name, getattr(owner, name)) for owner, name, _ in _STAND_INS]
    try:
        for owner, name, function in _STAND_INS:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in own:
            setattr(owner, name, function)
