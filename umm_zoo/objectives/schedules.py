"""Times at which a sampler asks its network, from noise (1) to data (0): even ones, and those of the library's schedulers."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers.schedulers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from umm_zoo.errors import Count, Positive, UserError
from umm_zoo.objectives.solvers import DPMSolver, Euler, Solver
from umm_zoo.objectives.times import shifted

_WHERE = "scheduler_config.json"
_HINT = "the objective's `schedule` and `solver` may be stated in its place"


class Schedule(NamedTuple):
    """Times of one sampling.

    Args:
        times: ``num_steps + 1`` of them, falling, the last 0.
        network_times: what the network gets at each step, ``num_steps`` of them; some pipelines round it.
    """

    times: list[float]
    network_times: list[float]


class TimeSchedule(ABC):
    """Block that spaces the times of a sampling."""

    @abstractmethod
    def __call__(self, num_steps: int, height: int, width: int) -> Schedule:
        """The times of ``num_steps`` steps to a latent of ``height`` x ``width`` cells.

        Raises:
            ValueError: fewer than one step.
        """


class EvenlySpaced(TimeSchedule):
    """Even steps from 1 to 0, moved towards noise by a shift. No release draws so: their first and last steps are others.

    Args:
        shift: 1 leaves the steps even; 3.0 is the number of Sana's and SD3's own schedules.

    Raises:
        ValueError: the shift is not positive.
    """

    def __init__(self, shift: Positive = 1.0) -> None:
        if shift <= 0:
            raise ValueError(f"EvenlySpaced.shift: found {shift}, expected more than 0")
        self.shift = shift

    def __call__(self, num_steps: int, height: int, width: int) -> Schedule:
        """See ``TimeSchedule``; the size is not looked at."""
        assert_steps(num_steps)
        times = [shifted(1 - k / num_steps, self.shift) for k in range(num_steps + 1)]
        return Schedule(times, times[:-1])


class ReversedLog(TimeSchedule):
    """Steps that are small at the noise and large at the data: ``log(m + u (n - m))`` of even u, brought to [0, 1].

    In three steps 1, .913, .766, 0 (Epsilon-VAE, Zhao et al., 2024, arXiv 2410.04081, section 3.4).

    Args:
        low, high: m and n.

    Raises:
        ValueError: ``high`` is not above ``low``.
    """

    def __init__(self, low: Positive = 1.0, high: Positive = 100.0) -> None:
        if high <= low:
            raise ValueError(f"ReversedLog.high: found {high}, expected more than low ({low})")
        self.low, self.high = low, high

    def __call__(self, num_steps: int, height: int, width: int) -> Schedule:
        """See ``TimeSchedule``; the size is not looked at."""
        assert_steps(num_steps)
        width_of_logs = math.log(self.high / self.low)
        even = [1 - k / num_steps for k in range(num_steps + 1)]
        times = [math.log((self.low + u * (self.high - self.low)) / self.low) / width_of_logs for u in even]
        return Schedule(times, times[:-1])


class ReleaseSchedule(ABC):
    """What the release of a decoder is trained and sampled on.

    Attributes:
        config: ``scheduler_config.json`` of its pipeline.
        objective: dotted path of the class of objectives that fits.
    """

    config: dict[str, Any]
    objective: ClassVar[str]

    def refused_by(self, objective: object) -> UserError:
        """The error of an objective of another kind."""
        found = f"{type(objective).__name__} for a decoder on a {self.config.get('_class_name')}"
        prediction = self.config.get("prediction_type")
        return UserError("objective", found + (f" that predicts '{prediction}'" if prediction else ""), f"a {self.objective}")


class LibrarySchedule(TimeSchedule, ReleaseSchedule):
    """The schedule of a scheduler of diffusers, as its pipelines call it: what the release of a flow draws on.

    SD3's (``FlowMatchEulerDiscreteScheduler``) applies its shift twice to the smallest time: with f that of ``times.shifted``, its
    times are f of even steps from 1 to f(1/1000), then 0; under ``use_dynamic_shifting`` the shift goes with the image's number of
    tokens. Sana's (``DPMSolverMultistepScheduler`` with ``use_flow_sigmas``) starts at f(0.999), and its network gets whole
    thousandths.

    Args:
        config: ``scheduler_config.json``; None is SD3's with a shift of 3.
        patch: cells of the latent per token along one side.
    """

    objective = "umm_zoo.objectives.flow_matching.FlowMatching"
    #: Settings under which ``Euler`` and ``DPMSolver`` make the scheduler's own steps.
    steps_as: ClassVar[dict[type[Any], dict[str, tuple[Any, ...]]]] = {
        FlowMatchEulerDiscreteScheduler: {"invert_sigmas": (False,), "stochastic_sampling": (False,)},
        DPMSolverMultistepScheduler: {
            "use_flow_sigmas": (True,),
            "prediction_type": ("flow_prediction",),
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (2, 1),
            "solver_type": ("midpoint",),
            "final_sigmas_type": ("zero",),
            "thresholding": (False,),
            "use_karras_sigmas": (False,),
            "use_exponential_sigmas": (False,),
            "use_beta_sigmas": (False,),
            "use_lu_lambdas": (False,),
            "use_dynamic_shifting": (False,),
        },
    }

    def __init__(self, config: Mapping[str, Any] | None = None, patch: Count = 1) -> None:
        self.config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0} if config is None else dict(config)
        self.patch = patch
        self._known: dict[tuple[int, int, int], Schedule] = {}  # a step of training asks for them many times

    def scheduler(self) -> Any:
        """The library's scheduler.

        Raises:
            UserError: it is another one, or makes its steps in another way.
        """
        kinds = {kind.__name__: kind for kind in self.steps_as}
        if (name := self.config.get("_class_name")) not in kinds:
            raise UserError(_WHERE, f"_class_name '{name}'", " or ".join(kinds), _HINT)
        with torch.device("cpu"):  # also while a method is built without memory
            scheduler = kinds[name].from_config(self.config)
        for key, accepted in self.steps_as[kinds[name]].items():
            if scheduler.config[key] not in accepted:
                expected = " or ".join(map(repr, accepted))
                raise UserError(_WHERE, f"{key} {scheduler.config[key]!r} of a {name}", expected, _HINT)
        return scheduler

    @property
    def solver(self) -> Solver:
        """The solver that makes the scheduler's steps."""
        return DPMSolver() if self.scheduler().config.get("solver_order") == 2 else Euler()

    def __call__(self, num_steps: int, height: int, width: int) -> Schedule:
        """See ``TimeSchedule``; a ``UserError`` where the scheduler makes none."""
        if (known := self._known.get((num_steps, height, width))) is not None:
            return known
        assert_steps(num_steps)
        try:
            made = self._times(num_steps, height, width)
        except UserError:
            raise
        except Exception as error:  # whatever the library makes of numbers that are none
            raise UserError(_WHERE, f"{self.config} ({type(error).__name__}: {error})", "numbers that make times", _HINT) from error
        if not (made.times[0] <= 1 and all(now > after for now, after in itertools.pairwise(made.times))):
            raise UserError(_WHERE, f"times {made.times} for {num_steps} steps", "falling ones from 1 or less", _HINT)
        self._known[num_steps, height, width] = made
        return made

    def _times(self, num_steps: int, height: int, width: int) -> Schedule:
        scheduler = self.scheduler()
        config, settings = scheduler.config, dict[str, Any]()
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            settings = self.settings(config, num_steps, (height // self.patch) * (width // self.patch))
        scheduler.set_timesteps(num_steps, device="cpu", **settings)
        # in the library's float32: the solver's first steps go by 1 - t
        return Schedule(scheduler.sigmas.tolist(), [time / config["num_train_timesteps"] for time in scheduler.timesteps.tolist()])

    def settings(self, config: Mapping[str, Any], num_steps: int, tokens: int) -> dict[str, Any]:
        """What the pipeline tells a ``FlowMatchEulerDiscreteScheduler`` beside the number of steps, for so many image tokens."""
        return {"mu": _line_of(config, tokens)} if config["use_dynamic_shifting"] else {}


class EvenLibrarySchedule(LibrarySchedule):
    """As ``LibrarySchedule``, from even steps that end one step before 0: the pipelines of FLUX.1, Z-Image and Qwen-Image."""

    def settings(self, config: Mapping[str, Any], num_steps: int, tokens: int) -> dict[str, Any]:
        """Times before the shift, and the shift."""
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": _line_of(config, tokens)}


class Lumina2Schedule(EvenLibrarySchedule):
    """As ``EvenLibrarySchedule``; under dynamic shifting Lumina 2's pipeline takes the channels of the latent for its tokens.

    Args:
        config, patch: see ``LibrarySchedule``.
        channels: of the latent.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, patch: Count = 2, channels: Count = 16) -> None:
        super().__init__(config, patch)
        self.channels = channels

    def settings(self, config: Mapping[str, Any], num_steps: int, tokens: int) -> dict[str, Any]:
        """Times before the shift, and the shift."""
        return super().settings(config, num_steps, self.channels)


class Flux2Schedule(EvenLibrarySchedule):
    """As ``EvenLibrarySchedule``, with FLUX.2's own fit of the shift to the numbers of tokens and of steps."""

    def settings(self, config: Mapping[str, Any], num_steps: int, tokens: int) -> dict[str, Any]:
        """Times before the shift, and the shift; numbers of the release's code."""
        at_200 = 0.00016927 * tokens + 0.45666666
        at_10 = at_200 if tokens > 4300 else 8.73809524e-05 * tokens + 1.89833333
        mu = at_200 + (at_200 - at_10) / 190 * (num_steps - 200)
        return super().settings(config, num_steps, tokens) | {"mu": mu}


def _line_of(config: Mapping[str, Any], tokens: int) -> float:
    """The exponent of the shift, on the scheduler's line over the number of tokens."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return float(config["base_shift"] + slope * (tokens - config["base_image_seq_len"]))


def assert_steps(num_steps: int) -> None:
    """Refuse to sample without a step.

    Raises:
        ValueError: fewer than one.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: found {num_steps}, expected 1 or more")
