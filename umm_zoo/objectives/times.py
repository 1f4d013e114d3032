"""Times between data (0) and noise (1): random ones for training, spaced ones for sampling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

from umm_zoo.errors import Finite, Positive, Weight

T = TypeVar("T", float, Tensor)


def shifted(time: T, shift: float) -> T:
    """``s t / (1 + (s - 1) t)``: moves times towards noise for s > 1, and leaves 0 and 1 where they are.

    Reference: Esser et al., 2024, arXiv 2403.03206, section 5.3.2; the ``flow_shift`` of Sana (3.0) and SD3.
    """
    return shift * time / (1 + (shift - 1) * time)


def exact() -> torch.dtype:
    """The default dtype where it is wide enough for times and for states that steps are added to, else float32."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class TimeSampler(ABC):
    """Random times at which a flow is trained.

    Shape:
        - output: ``[count]`` float32 in [0, 1]
    """

    @abstractmethod
    def __call__(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Independent times."""


class UniformTimes(TimeSampler):
    """Uniform in [0, 1): what MetaQuery, OpenUni and BLIP3-o train with; WeMMU does not state its own."""

    def __call__(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Independent times."""
        return torch.rand(count, generator=generator, device=device, dtype=exact())


class LogitNormalTimes(TimeSampler):
    """The logistic function of a normal draw: Sana's and SD3's choice, most often in the middle.

    Time is 1 at noise here, and the mean is of the logit of that time. The trainers of diffusers draw the same number (their
    ``logit_mean``) but take it for a position in the scheduler's list of times, which falls from noise to data: their sign is the
    other one, ``LogitNormalTimes(mean=-logit_mean)`` here. At 0, the default of both, there is no difference.

    Reference: Esser et al., 2024, arXiv 2403.03206, section 3.1.

    Args:
        mean: of the normal; above 0 leans towards noise.
        deviation: of the normal.
    """

    def __init__(self, mean: Finite = 0.0, deviation: Weight = 1.0) -> None:
        self.mean, self.deviation = mean, deviation

    def __call__(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Independent times."""
        return torch.sigmoid(self.mean + self.deviation * torch.randn(count, generator=generator, device=device, dtype=exact()))


class ShiftedTimes(TimeSampler):
    """Another sampler's times, moved towards noise, where the condition decides what is generated.

    Args:
        shift: 3.0 in Sana's recipe (over ``LogitNormalTimes``).
        times: the sampler; None is uniform.

    Raises:
        ValueError: the shift is not positive.
    """

    def __init__(self, shift: Positive, times: TimeSampler | None = None) -> None:
        if shift <= 0:
            raise ValueError(f"ShiftedTimes.shift: found {shift}, expected more than 0")
        self.shift, self.times = shift, times or UniformTimes()

    def __call__(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Independent times."""
        return shifted(self.times(count, device, generator), self.shift)
