"""Frozen parts whose weights wait on the CPU and are on the device only while they compute, one part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.errors import UserError


@dataclass
class _Weight:
    """A parameter: where it stands, its numbers on the CPU, and what stands in the parameter while the part is not in use."""

    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]
    home: Tensor
    empty: Tensor | None = None


class Offload:
    """The parts of a method that wait on the CPU.

    The first layer of a part that is called brings all of it; it stays until another of these parts is called, or a backward pass
    begins. Until then its parameters are on the device by name, of their shape and dtype, and NaN throughout in the memory of one
    number: code that asks a weight for its device gets the right one, and code that reads one past its layer gets no numbers that
    look like some. What a checkpoint holds is read from the CPU.

    Args:
        parts: frozen ones by name, on the CPU.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.here: str | None = None  # the part whose weights are on the device
        self._device: torch.device | None = None  # None until the method has been moved anywhere: nothing waits before
        self._weights: dict[str, list[_Weight]] = {}
        for name, part in parts.items():
            found: dict[int, _Weight] = {}
            for module in part.modules():
                own = [(key, parameter) for key, parameter in module._parameters.items() if parameter is not None]
                for key, parameter in own:
                    weight = found.setdefault(id(parameter), _Weight(parameter, [], parameter.data))
                    weight.places.append((module, key))
                if own:
                    module.register_forward_pre_hook(_Arrival(self, name), with_kwargs=True)
                    module.register_state_dict_post_hook(_Stored(found))
                    module.register_load_state_dict_pre_hook(_Loading(self, name))
                    module.register_load_state_dict_post_hook(_Loading(self, name))
            self._weights[name] = list(found.values())

    def weights(self) -> list[nn.Parameter]:
        """All parameters that wait."""
        return [weight.parameter for weights in self._weights.values() for weight in weights]

    def arrive(self, name: str) -> None:
        """Bring a part, in the place of the one that is there."""
        if self._device is None or self.here == name:
            return
        self.leave()
        with torch.inference_mode(False):
            for weight in self._weights[name]:
                weight.parameter.data = weight.home.to(self._device, non_blocking=True)
        self.here = name

    def leave(self) -> None:
        """Let no part be there."""
        for weight in self._weights[self.here] if self.here is not None else ():
            assert weight.empty is not None
            weight.parameter.data = weight.empty
        self.here = None

    @contextmanager
    def moving(self, move: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Keep the parts out while everything else is moved or cast; then they are cast too, on the CPU, and wait."""
        weights = [weight for own in self._weights.values() for weight in own]
        for weight in weights:
            for module, key in weight.places:
                module._parameters[key] = None
        try:
            yield
        finally:
            for weight in weights:
                for module, key in weight.places:
                    module._parameters[key] = weight.parameter
        self.here = None
        with torch.no_grad():
            for weight in weights:
                moved = move(weight.home)
                self._device = moved.device
                home = weight.home.to(moved.dtype) if moved.device.type != "cpu" else moved
                pinned = moved.device.type == "cuda" and not home.is_pinned()
                weight.home = home.pin_memory() if pinned else home
                weight.empty = moved.new_full((), float("nan")).expand(moved.shape)
                weight.parameter.data = weight.empty

    def at_home(self, name: str, is_at_home: bool) -> None:
        """Let the parameters of a part be the numbers on the CPU, so that others can be copied into them; or wait again."""
        if self._device is None:
            return
        if self.here == name:
            self.leave()
        for weight in self._weights[name]:
            assert weight.empty is not None
            weight.parameter.data = weight.home if is_at_home else weight.empty


class _Arrival:
    """Hook before a layer of a part; an object, so that a copy of a whole method has one of its own."""

    def __init__(self, offload: Offload, name: str) -> None:
        self.offload, self.name = offload, name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            assert_no_gradient(self.name, (*args, *kwargs.values()))
        self.offload.arrive(self.name)


class _Stored:
    """Hook behind a layer's ``state_dict``: the numbers on the CPU."""

    def __init__(self, weights: dict[int, _Weight]) -> None:
        self.weights = weights

    def __call__(self, layer: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key, parameter in layer._parameters.items():
            if parameter is not None and f"{prefix}{key}" in state:
                state[f"{prefix}{key}"] = self.weights[id(parameter)].home


class _Loading:
    """Hook before and behind the loading of a layer's state."""

    def __init__(self, offload: Offload, name: str) -> None:
        self.offload, self.name = offload, name

    def __call__(self, layer: nn.Module, *given: Any) -> None:
        self.offload.at_home(self.name, len(given) > 1)  # behind, there is the list of keys alone


def assert_no_gradient(name: str, inputs: tuple[Any, ...]) -> None:
    """Refuse to offload a part whose weights a backward pass needs again.

    Raises:
        UserError: one of its inputs requires a gradient.
    """
    if any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        expected = "parts that none passes: codecs, encoders of targets, a model that only encodes prompts"
        raise UserError("training.offload", f"'{name}', which a gradient passes on its way to what is trained", expected)
