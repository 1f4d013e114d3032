"""Tensors that shapes alone decide (masks, places, tables of sines): made once on the CPU, and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from umm_zoo.backbones.devices import send

_P = ParamSpec("_P")
_Made = TypeVar("_Made")  # a tensor, or a tuple of them
#: Results of a function that are kept, those asked for last (our choice): a few buckets of image sizes and lengths.
_KEPT = 32


def by_shape(make: Callable[_P, _Made]) -> Callable[Concatenate[torch.device, _P], _Made]:
    """A function of sizes and dtypes that makes tensors, as one that makes them once for a device, which it takes first.

    They are made on the CPU, in whatever mode the first caller is, and must not be written to. While torch compiles they become a
    part of its graph, and on the ``meta`` device nothing is kept.

    Args:
        make: of arguments without names that have a hash; it draws no random numbers and reads no tensor.
    """

    def sent(device: torch.device, *arguments: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            made = make(*arguments)  # type: ignore[call-arg]
        return tree_map_only(Tensor, lambda tensor: send(tensor, device), made)

    @lru_cache(maxsize=_KEPT)
    def kept(device: torch.device, *arguments: Any) -> Any:
        with unset_fake_temporarily():  # what a trial without numbers meets first, training may meet later
            return sent(device, *arguments)

    @wraps(make)
    def made(device: torch.device, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():  # inductor makes on a GPU what goes there
            return tree_map_only(Tensor, lambda tensor: tensor.to(device), make(*arguments))  # type: ignore[call-arg]
        return (sent if device.type == "meta" else kept)(device, *arguments)

    return made  # type: ignore[return-value]


@by_shape
def triangle(size: int) -> Tensor:
    """Causal mask ``[N, N]`` bool: True where the row may attend to the column."""
    return torch.ones(size, size, dtype=torch.bool).tril()


@by_shape
def diagonal(size: int) -> Tensor:
    """``[N, N]`` bool, True where row and column are one."""
    return torch.eye(size, dtype=torch.bool)


@by_shape
def numbers(size: int) -> Tensor:
    """``[N]`` long, from 0."""
    return torch.arange(size)


@by_shape
def constants(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Numbers, ``[n]``."""
    return torch.tensor(values, dtype=dtype)
