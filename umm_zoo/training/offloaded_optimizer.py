"""AdamW whose moments wait in the memory of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from umm_zoo.training.optimization import AdamW, keep_kernel

#: Bytes of moments that are on the device at a time (our choice).
_AT_A_TIME = 2**28


class OffloadedAdamW(AdamW):
    """AdamW with its moments on the CPU, which are on the device for the update of their weights, some at a time.

    Arguments and numbers are those of ``AdamW``, and either goes on from the other's checkpoint. Eight bytes a trained weight go to
    the device and back at every update; it is for what would not fit otherwise. Not with strategies that share weights out: their
    moments are shared out already. Not run on a GPU by us: on the CPU nothing moves.
    """

    def make(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Torch's, in rounds."""
        made = _Rounds(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=self.kernel(groups))
        made._step_supports_amp_scaling = False  # as in AdamW
        made.register_load_state_dict_pre_hook(keep_kernel)
        return made

    def state_bytes(self, parameter: nn.Parameter) -> float:
        """Nothing stays on the device."""
        return 0.0


class _Rounds(torch.optim.AdamW):
    """Updates some parameters at a time, whose states come and go."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all of them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            for group in groups:
                for some in in_rounds([weight for weight in group["params"] if weight.grad is not None], _AT_A_TIME):
                    self._move(some, None)
                    self.param_groups = [{**group, "params": some}]
                    super().step()
                    self._move(some, torch.device("cpu"))
        finally:
            self.param_groups = groups
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which brings states to the weights; then they wait."""
        super().load_state_dict(state_dict)
        self._move([weight for group in self.param_groups for weight in group["params"]], torch.device("cpu"))

    def _move(self, weights: Sequence[nn.Parameter], place: torch.device | None) -> None:
        """Bring states to a device; None is that of their weight."""
        for weight in weights:
            for name, value in self.state.get(weight, {}).items():
                goal = place or weight.device
                if isinstance(value, Tensor) and value.device != goal:
                    moved = value.to(goal, non_blocking=place is None)
                    self.state[weight][name] = moved.pin_memory() if goal.type == "cpu" else moved


def in_rounds(weights: Sequence[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in lists whose moments have at most so many bytes, or one parameter more than that."""
    some, size = list[nn.Parameter](), 0
    for weight in weights:
        own = 2 * weight.numel() * weight.element_size()
        if some and size + own > most:
            yield some
            some, size = [], 0
        some, size = [*some, weight], size + own
    if some:
        yield some
