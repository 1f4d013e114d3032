"""Quantised weights, known by what they are: which they are, how much memory they take, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.errors import UserError

#: Packages whose tensors hold quantised numbers.
_PACKAGES = ("bitsandbytes", "torchao")


def is_quantized(tensor: Any) -> bool:
    """Whether a tensor holds a library's quantised numbers, or would where it is built on the meta device."""
    return hasattr(tensor, "quantized_as") or type(tensor).__module__.partition(".")[0] in _PACKAGES


def find_quantized(module: nn.Module) -> str | None:
    """Name of a quantised weight of a module; None where it has none."""
    return next((name for name, parameter in module.named_parameters() if is_quantized(parameter)), None)


def assert_castable(module: nn.Module, precision: str) -> None:
    """Refuse a trainer's precision that casts weights to another dtype than the scales of quantised ones.

    Raises:
        UserError: names the dtype that the part is to be loaded in.
    """
    wanted = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision)
    for name, own in module.named_parameters() if wanted else ():
        if is_quantized(own) and own.is_floating_point() and own.dtype != wanted:
            found = f"{precision} and quantised weights in {str(own.dtype).removeprefix('torch.')} ('{name}')"
            raise UserError("trainer.precision", found, f"dtype: {str(wanted).removeprefix('torch.')} where they are loaded")


def assert_not_quantized(module: nn.Module, where: str, found: str, expected: str) -> None:
    """Refuse what cannot be with quantised weights.

    Raises:
        UserError: there are some.
    """
    if (name := find_quantized(module)) is not None:
        raise UserError(where, f"{found} and quantised weights ('{name}')", expected)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of one on the meta device that would be quantised, as many as it would take then."""
    marked = getattr(tensor, "quantized_as", None)
    return int(marked[1]) if marked else tensor.numel() * tensor.element_size()


def stored_as(tensor: Tensor) -> str:
    """What the numbers of a tensor are, for people."""
    marked = getattr(tensor, "quantized_as", None)
    return str(marked[0]) if marked else str(tensor.dtype).removeprefix("torch.")


def held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of plain numbers that the quantised weights of a module are made of, scales included, by name."""
    for name, layer in module.named_modules():
        if any(is_quantized(parameter) for parameter in layer.parameters(recurse=False)):
            for key, value in layer.state_dict().items():
                yield from _plain(f"{name}.{key}" if name else key, value)


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    if type(tensor).__module__.partition(".")[0] not in _PACKAGES:
        yield name, tensor
    elif hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor.data
