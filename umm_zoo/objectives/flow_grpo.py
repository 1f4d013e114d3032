"""Group-relative policy optimisation of a flow: sampling becomes a chain of Gaussian steps whose means are the policy.

Convention: ``x_t = (1 - t) x_0 + t noise``, ``v = noise - x_0``, time runs from 1 (noise) to 0 (data). Step k goes from time k of
the schedule to time k + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from umm_zoo.batch import Tokens
from umm_zoo.errors import Count, Positive, Weight
from umm_zoo.objectives.advantages import Advantage, BatchStandardised
from umm_zoo.objectives.base import Predictor, at_least_float32
from umm_zoo.objectives.grpo import clipped_gains
from umm_zoo.objectives.schedules import LibrarySchedule, Schedule, TimeSchedule
from umm_zoo.objectives.times import exact

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_SD3 = LibrarySchedule()


@dataclass
class Transition:
    """One Gaussian step.

    Shape:
        - mean: ``[R, C, h, w]``
        - std, diffusion, dt: numbers: the step's deviation s, the coefficient g of the process, the (negative) length of the step.
    """

    mean: Tensor
    std: float
    diffusion: float
    dt: float

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of ``x`` [R, C, h, w], the mean over all its elements and not the sum: ``[R]``.

        So the ratio of two policies is a geometric mean per dimension, and clips of 1e-4 make sense.

        Raises:
            ValueError: the step is deterministic.
        """
        if self.std == 0:
            raise ValueError("log_prob: found a step without noise (noise_level 0), expected one that has a density")
        errors = (x.to(self.mean.dtype) - self.mean).square() / (2 * self.std**2)
        return -errors.flatten(1).mean(dim=1) - math.log(self.std) - _HALF_LOG_TWO_PI

    def divergence(self, reference: Tensor) -> Tensor:
        """Distance of the mean from that of the reference policy, ``[R]``, which Flow-GRPO's release adds.

        The mean over elements divided by ``2 g^2``, which is ``|dt| / D`` of the KL ``|mean - mean_ref|^2 / (2 s^2)``.
        """
        return (self.mean - reference).square().flatten(1).mean(dim=1) / (2 * self.diffusion**2)


def stochastic_step(x: Tensor, velocity: Tensor, times: list[float], step: int, noise_level: float) -> Transition:
    """A step of the reverse-time process that has the same marginals as the flow, as Flow-GRPO's release discretises it.

    ``dx = [v + g^2 / (2 t) (x + (1 - t) v)] dt + g dw`` with ``g = noise_level sqrt(t / (1 - t))``; at the first step 1 - t is that
    of the next time, so that g is finite at t = 1 (in the release at 1 alone; Sana's schedule starts just below it).
    ``noise_level`` 0 is the Euler step of the flow.

    Args:
        x, velocity: ``[R, C, h, w]``.
        times: the schedule.
        step: position in it.
        noise_level: 0.7 in the release.
    """
    t, dt = times[step], times[step + 1] - times[step]
    x, velocity = at_least_float32(x), at_least_float32(velocity)
    if noise_level == 0:
        return Transition(x + velocity * dt, 0.0, 0.0, dt)
    g = noise_level * math.sqrt(t / (1 - (times[1] if step == 0 else t)))
    mean = x * (1 + g**2 / (2 * t) * dt) + velocity * (1 + g**2 * (1 - t) / (2 * t)) * dt
    return Transition(mean, g * math.sqrt(-dt), g, dt)


@dataclass
class Trajectory:
    """States of R samples on their way from noise to data.

    Shape:
        - states: ``[S + 1, R, C, h, w]``, noise first
        - log_probs: ``[S, R]``
    """

    states: Tensor
    log_probs: Tensor

    @property
    def samples(self) -> Tensor:
        """The latents at time 0, ``[R, C, h, w]``."""
        return self.states[-1]


class FlowGRPO:
    """Clipped policy gradient on the steps of a stochastic sampler.

    Defaults are Flow-GRPO's released ones; UAE's third stage does not state its own. The last step has almost no noise and is not
    trained (the first 99 % are, 9 of 10).

    Reference: Liu et al., "Flow-GRPO" (arXiv 2505.05470) and its released code; Yan et al., "UAE" (arXiv 2509.09666).

    Attributes:
        trained_steps: positions of the steps that are trained.

    Args:
        num_steps: S, while sampling for training.
        schedule: None is the one that the decoder is evaluated on (``LibrarySchedule()``, SD3's, where there is none); a last step
            that is long, as with ``EvenlySpaced``, leaves noise in the samples.
        noise_level: the factor a of the process.
        clip: half-width of the interval of ratios that count in full; for a latent of few dimensions the ratio spreads wider
            (its exponent is 1/D), 1e-3 to 1e-2 there.
        advantage: None is ``BatchStandardised``.
        kl_weight: 0 by default, 0.01 to 0.04 in the release's runs.

    Raises:
        ValueError: no noise, or fewer than two steps.
    """

    def __init__(
        self,
        num_steps: Count = 10,
        schedule: TimeSchedule | None = None,
        noise_level: Positive = 0.7,
        clip: Weight = 1e-4,
        advantage: Advantage | None = None,
        kl_weight: Weight = 0.0,
    ) -> None:
        if noise_level <= 0:
            raise ValueError(f"noise_level: found {noise_level}, expected more than 0: without noise there is no policy")
        if num_steps < 2:
            raise ValueError(f"num_steps: found {num_steps}, expected 2 or more: the last step is not trained")
        self.num_steps, self.schedule = num_steps, schedule
        self.noise_level, self.clip, self.kl_weight = noise_level, clip, kl_weight
        self.advantage = advantage or BatchStandardised()
        self.trained_steps = range(int(0.99 * num_steps))

    def match(self, own: TimeSchedule | None) -> None:
        """Train on the schedule of evaluation where no other is stated."""
        self.schedule = self.schedule or own

    def times(self, x: Tensor) -> Schedule:
        """The schedule for states ``x`` [R, C, h, w]."""
        return (self.schedule or _SD3)(self.num_steps, *x.shape[-2:])

    def transition(self, velocity: Predictor, x: Tensor, step: int, condition: Tokens) -> Transition:
        """The step from ``x`` [R, C, h, w] under a velocity field."""
        times, network_times = self.times(x)
        time = torch.full((len(x),), network_times[step], device=x.device, dtype=exact())
        return stochastic_step(x, velocity(x, time, condition), times, step, self.noise_level)

    @torch.no_grad()
    def rollout(
        self, velocity: Predictor, noise: Tensor, condition: Tokens, generator: torch.Generator | None = None
    ) -> Trajectory:
        """Sample from ``noise`` [R, C, h, w] and keep every state and log-probability."""
        states, log_probs = [noise], []
        for step in range(self.num_steps):
            transition = self.transition(velocity, states[-1], step, condition)
            random = torch.randn(noise.shape, generator=generator, device=noise.device, dtype=transition.mean.dtype)
            states.append(transition.mean + transition.std * random)
            log_probs.append(transition.log_prob(states[-1]))
        return Trajectory(torch.stack(states), torch.stack(log_probs))

    def step_loss(
        self,
        velocity: Predictor,
        trajectory: Trajectory,
        step: int,
        condition: Tokens,
        advantages: Tensor,
        reference: Predictor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of one step, averaged over its R samples.

        Args:
            velocity: the policy, with a gradient.
            trajectory: sampled from this policy, or from one that was it some updates ago.
            step: among ``trained_steps``.
            condition: of the samples.
            advantages: ``[R]``.
            reference: velocity field that the KL is taken against; None leaves it out.

        Returns:
            ``loss``; and without gradient ``clip_fraction``, ``kl`` and ``ratio_spread`` (mean of |ratio - 1|).
        """
        x = trajectory.states[step]
        transition = self.transition(velocity, x, step, condition)
        ratios = (transition.log_prob(trajectory.states[step + 1]) - trajectory.log_probs[step]).exp()  # [R]
        gains, active = clipped_gains(ratios, advantages, self.clip)
        divergence = torch.zeros_like(ratios)
        if reference is not None:
            with torch.no_grad():
                other = self.transition(reference, x, step, condition).mean
            divergence = transition.divergence(other)
        return {
            "loss": self.kl_weight * divergence.mean() - gains.mean(),
            "clip_fraction": active.float().mean(),
            "kl": divergence.mean().detach(),
            "ratio_spread": (ratios.detach() - 1).abs().mean(),
        }
