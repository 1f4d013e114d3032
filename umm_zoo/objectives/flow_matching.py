"""Flow matching with straight interpolants from data to noise, plain and with contrast between samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from umm_zoo.batch import Tokens
from umm_zoo.errors import Count, Natural, Weight
from umm_zoo.objectives.base import Predictor, Shape, at_least_float32, shape_of
from umm_zoo.objectives.decoding import DecoderObjective
from umm_zoo.objectives.guidance import Branch
from umm_zoo.objectives.schedules import EvenlySpaced, LibrarySchedule, ReleaseSchedule, Schedule, TimeSchedule, assert_steps
from umm_zoo.objectives.solvers import DPMSolver, Solver
from umm_zoo.objectives.times import TimeSampler, UniformTimes, exact


class Interpolant(NamedTuple):
    """Points between the data and noise of a batch: ``noisy = (1 - t) data + t noise`` and ``velocity = noise - data``."""

    noisy: Tensor
    time: Tensor
    velocity: Tensor


class FlowMatching(DecoderObjective):
    """Regression of the velocity ``noise - data`` on straight interpolants (Lipman et al., 2023, arXiv 2210.02747).

    All times weigh 1. The denoiser is called with times in [0, 1], 0 being data. Latents, noise and errors are kept in float32 (or
    float64) whatever the network computes in.

    Args:
        times: of training; None is uniform, which MetaQuery, OpenUni and BLIP3-o use (WeMMU does not state its own).
        num_steps: of sampling, 20 as in Sana's and OpenUni's recipe.
        schedule: of sampling; None is the decoder's own, that of its release (``EvenlySpaced(3.0)`` for a network that has none).
        solver: of sampling; None is the decoder's own (``DPMSolver`` for a network that has none).

    Raises:
        ValueError: fewer than one step.
    """

    makes: ClassVar[tuple[str, ...]] = ("loss", "flow")

    def __init__(
        self,
        times: TimeSampler | None = None,
        num_steps: Count = 20,
        schedule: TimeSchedule | None = None,
        solver: Solver | None = None,
    ) -> None:
        assert_steps(num_steps)
        self.times, self.num_steps, self.schedule, self.solver = times or UniformTimes(), num_steps, schedule, solver

    def match(self, own: ReleaseSchedule | None) -> None:
        """Sample as the decoder's release does where neither ``schedule`` nor ``solver`` says another way.

        Args:
            own: ``ImageDecoder.schedule``; None changes nothing.

        Raises:
            UserError: the release is no flow, its scheduler makes no times, or steps in a way that no solver here does.
        """
        if own is None:
            return
        if not isinstance(own, LibrarySchedule):
            raise own.refused_by(self)
        if self.schedule is None:
            own(self.num_steps, own.patch, own.patch)  # now, and not in the first validation
            self.schedule = own
        self.solver = self.solver or own.solver

    def draw(self, latents: Tensor, generator: torch.Generator | None = None) -> Interpolant:
        """Times and noise for a batch of clean latents."""
        latents = at_least_float32(latents)
        time = self.times(len(latents), latents.device, generator).to(latents.dtype)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return self.interpolate(latents, time, noise)

    def interpolate(self, latents: Tensor, time: Tensor, noise: Tensor) -> Interpolant:
        """The points at given times ``[B]`` and noise ``[B, C, h, w]``."""
        t = time[:, None, None, None]
        return Interpolant((1 - t) * latents + t * noise, time, noise - latents)

    def terms(
        self, denoiser: Predictor, groups: Sequence[tuple[Interpolant, Tokens]], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Every term at the points of groups of rows, ``[B]``: ``loss`` is minimised, ``flow`` is the velocity's plain error."""
        flow = _errors(self._predict(denoiser, groups), _velocities(groups))
        return {"loss": flow, "flow": flow}

    def losses(self, denoiser: Predictor, latents: Tensor, condition: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """As ``Objective.losses``, one draw per sample: ``[1, B]``."""
        return self.terms(denoiser, [(self.draw(latents, generator), condition)], generator)["loss"][None]

    def __call__(
        self, denoiser: Predictor, latents: Tensor, condition: Tokens, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Means over the batch: ``loss``, and ``flow``, the plain error, by which different objectives can be compared."""
        return self.over_sizes(denoiser, [(latents, condition)], generator)

    def over_sizes(
        self, denoiser: Predictor, groups: Sequence[tuple[Tensor, Tokens]], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See ``Objective.over_sizes``."""
        drawn = [(self.draw(latents, generator), condition) for latents, condition in groups]
        terms = self.terms(denoiser, drawn, generator)
        return {name: value.mean() if name == "loss" else value.detach().mean() for name, value in terms.items()}

    @torch.no_grad()
    def sample(
        self,
        denoiser: Predictor,
        shape: Shape,
        condition: Tokens | Sequence[Branch],
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """See ``DecoderObjective``."""
        denoiser, condition, x = self.begin(denoiser, shape, condition, generator, noise)
        device = x.device
        fixed, steps = condition, self.sampling_times(num_steps, *shape[-2:])
        network_time = dict(zip(steps.times, steps.network_times, strict=False))

        def velocity(state: Tensor, time: float) -> Tensor:
            times = torch.full((len(state),), network_time.get(time, time), device=device, dtype=exact())
            return denoiser(state, times, fixed).to(state.dtype)

        return (self.solver or DPMSolver())(velocity, x, steps.times)

    @property
    def num_noises(self) -> int:
        """That it starts from."""
        return 1

    def sample_from(self, denoiser: Predictor, noise: Tensor, condition: Tokens) -> Tensor:
        """As the base class."""
        return self.sample(denoiser, shape_of(noise), condition, noise=noise[0])

    def sampling_times(self, num_steps: int | None, height: int, width: int) -> Schedule:
        """The times of sampling a latent of ``height`` x ``width`` cells; None is the objective's own number of steps."""
        return (self.schedule or EvenlySpaced(3.0))(num_steps or self.num_steps, height, width)

    def _predict(self, denoiser: Predictor, groups: Sequence[tuple[Interpolant, Tokens]]) -> list[Tensor]:
        return [denoiser(own.noisy, own.time, condition).to(own.velocity.dtype) for own, condition in groups]


class ContrastiveFlowMatching(FlowMatching):
    """Flow matching that also pushes the velocity away from that of another sample (Stoica et al., 2025, arXiv 2506.05350).

    ``|v - v+|^2 - weight |v - v-|^2`` per element, v- being noise minus data of another sample of the batch, its own image and
    its own noise. WeMMU trains its first stage with it. Negatives are drawn uniformly from all other samples.

    With negatives independent of the condition the minimiser is an affine map of the plain one,
    ``(v + weight mu) / (1 - weight)``, mu being the mean latent: the loss is not comparable with flow matching's and may be
    negative, so the plain error is logged as ``flow`` beside it. Two rows of a batch that show the same image are false negatives
    of each other. Negatives are of the micro-batch by definition: a step that is shared out otherwise has others, and is another
    step; each row weighs alike all the same. A negative of another size is cut, or repeated, to that of the row (our choice).

    Args:
        weight: lambda; 0.05 in both papers. 0 is flow matching.
        gather_below: with fewer rows than this on any rank, those of all ranks serve as negatives while training (our choice).
        times, num_steps, schedule, solver: as in ``FlowMatching``.

    Raises:
        ValueError: a weight outside [0, 1), or one that has no other sample to be contrasted with while training.
    """

    makes: ClassVar[tuple[str, ...]] = ("loss", "flow", "contrast")

    def __init__(
        self,
        weight: Weight = 0.05,
        gather_below: Natural = 8,
        times: TimeSampler | None = None,
        num_steps: Count = 20,
        schedule: TimeSchedule | None = None,
        solver: Solver | None = None,
    ) -> None:
        super().__init__(times=times, num_steps=num_steps, schedule=schedule, solver=solver)
        if not 0 <= weight < 1:
            raise ValueError(f"ContrastiveFlowMatching.weight: found {weight}, expected 0 or more and below 1")
        self.weight, self.gather_below = weight, gather_below

    def terms(
        self, denoiser: Predictor, groups: Sequence[tuple[Interpolant, Tokens]], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Adds ``contrast``, the error against the other sample's velocity, ``[B]``."""
        predicted, velocities = self._predict(denoiser, groups), _velocities(groups)
        flow = _errors(predicted, velocities)
        contrast = _errors(predicted, self.negatives(velocities, generator))
        return {"loss": flow - self.weight * contrast, "flow": flow, "contrast": contrast}

    def negatives(self, velocities: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        """Another sample's velocity for every row of groups ``[m, C, h, w]``.

        Raises:
            ValueError: there is no other sample while training; outside of training the row itself stands in.
        """
        training = torch.is_grad_enabled()
        pool, first = list(velocities), 0
        # validation batches may differ between ranks, where an exchange would wait for ever
        if training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            pool, first = self._pool(velocities)
        counts, total, device = [len(own) for own in velocities], sum(map(len, pool)), velocities[0].device
        if total < 2:
            if training:
                raise ValueError("ContrastiveFlowMatching: found a batch of one, expected two rows or more over all ranks")
            return pool
        own = first + torch.arange(sum(counts), device=device)
        away = torch.randint(1, total, (sum(counts),), generator=generator, device=device)
        chosen = (own + away) % total
        if len({stack.shape[1:] for stack in (*velocities, *pool)}) == 1:
            return list((pool[0] if len(pool) == 1 else torch.cat(pool))[chosen].split(counts))
        rows, numbers = [row for stack in pool for row in stack], iter(chosen.tolist())
        return [torch.stack([_fitted(rows[next(numbers)], *own.shape[-2:]) for own in stack]) for stack in velocities]

    def _pool(self, velocities: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        """The velocities that may serve, and where this rank's begin. Ranks that lost a bad sample have fewer rows than others."""
        own = [row for stack in velocities for row in stack]
        rows = [int(number) for number in _gathered(torch.tensor([len(own)], device=own[0].device))]
        if min(rows) >= self.gather_below:  # every rank comes to the same conclusion
            return list(velocities), 0
        channels, missing = len(own[0]), [(0, 0)] * (max(rows) - len(own))
        sizes = _gathered(torch.tensor([*(row.shape[-2:] for row in own), *missing], device=own[0].device))
        shapes = [(channels, *size) for part, count in zip(sizes, rows, strict=True) for size in part[:count].tolist()]
        padded = own[0].new_zeros(max(rows), max(map(math.prod, shapes)))
        for place, row in enumerate(own):
            padded[place, : row.numel()] = row.flatten()
        flat = [row for part, count in zip(_gathered(padded), rows, strict=True) for row in part[:count]]
        pool = [row[: math.prod(shape)].view(1, *shape) for row, shape in zip(flat, shapes, strict=True)]
        return pool, sum(rows[: dist.get_rank()])


def _gathered(mine: Tensor) -> list[Tensor]:
    """The same tensor of every rank, of one shape on all."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return parts


def _fitted(velocity: Tensor, height: int, width: int) -> Tensor:
    """``[C, h, w]`` cut, or repeated, to ``[C, height, width]``."""
    rows, columns = (torch.arange(wanted) % side for wanted, side in zip((height, width), velocity.shape[-2:], strict=True))
    return velocity[:, rows.to(velocity.device)][:, :, columns.to(velocity.device)]


def _velocities(groups: Sequence[tuple[Interpolant, Tokens]]) -> list[Tensor]:
    return [points.velocity for points, _ in groups]


def _errors(predicted: Sequence[Tensor], velocities: Sequence[Tensor]) -> Tensor:
    """Mean squared error of each row of all groups, ``[B]``."""
    pairs = zip(predicted, velocities, strict=True)
    return torch.cat([(found - wanted).square().flatten(1).mean(dim=1) for found, wanted in pairs])
