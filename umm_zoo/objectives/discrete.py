"""Diffusion on the discrete steps of a release's scheduler: networks that predict noise, v or the clean latent."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import diffusers.schedulers
import torch
from diffusers.schedulers import DDPMScheduler
from torch import Tensor

from umm_zoo.batch import Tokens
from umm_zoo.errors import Count, UserError
from umm_zoo.objectives.base import Predictor, Shape, at_least_float32
from umm_zoo.objectives.decoding import DecoderObjective
from umm_zoo.objectives.guidance import Branch
from umm_zoo.objectives.schedules import ReleaseSchedule, assert_steps

_WHERE = "scheduler_config.json"
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
#: Settings under which a network is told, or its latents are mixed, in another way than training does here.
_REFUSED = {"timestep_type": "continuous", "use_flow_sigmas": True}


class DiscreteSchedule(ReleaseSchedule):
    """The scheduler of a release of diffusion on discrete steps: its noise, what the network predicts, how it is sampled.

    Args:
        config: ``scheduler_config.json``; None is that of Stable Diffusion 1.5.
        fixed: what the pipeline says in its place, where the scheduler knows the word.
    """

    objective = "umm_zoo.objectives.discrete.DiscreteDiffusion"
    #: Stable Diffusion 1.5's.
    first: ClassVar[dict[str, Any]] = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }

    def __init__(self, config: Mapping[str, Any] | None = None, fixed: Mapping[str, Any] | None = None) -> None:
        self.config, self.fixed = dict(self.first if config is None else config), dict(fixed or {})

    def scheduler(self, name: str | None = None) -> Any:
        """A scheduler of the library for one sampling.

        Args:
            name: of its class; None is the release's.

        Raises:
            UserError: no such class, one without discrete steps or with others than the release's, one that does not lead from
                noise to data, or one of a network that predicts something else.
        """
        where, name = ("objective.sampler", name) if name else (_WHERE, str(self.config.get("_class_name")))
        kind: Any = getattr(diffusers.schedulers, name, None)
        try:
            with torch.device("cpu"):  # also while a method is built without memory
                scheduler: Any = None if kind is None else kind.from_config(self.config)
        except Exception as error:  # whatever the library makes of numbers that are none
            raise UserError(where, f"{self.config} ({type(error).__name__}: {error})", "settings that make a scheduler") from error
        if getattr(scheduler, "alphas_cumprod", None) is None or "Inverse" in name:
            raise UserError(
                where, f"'{name}'", "a scheduler of diffusers with discrete steps from noise to data, such as DDIMScheduler"
            )
        for key, value in _REFUSED.items():
            if scheduler.config.get(key) == value:
                raise UserError(where, f"{key} {value!r} of a {name}", "discrete steps, as the network is trained on them")
        scheduler.register_to_config(**{key: value for key, value in self.fixed.items() if key in scheduler.config})
        if (found := scheduler.config.prediction_type) not in _PREDICTIONS:
            raise UserError(_WHERE, f"prediction_type '{found}'", " or ".join(map(repr, _PREDICTIONS)))
        return scheduler

    @cached_property
    def training(self) -> Any:
        """The library's ``DDPMScheduler`` of the same settings, by whose tables everybody trains.

        What the file leaves out is the default of the release's class, not of this one.
        """
        settings = dict(self.scheduler().config)
        settings.pop("_use_default_values", None)  # from_config would take its own class's defaults for these
        with torch.device("cpu"):
            return DDPMScheduler.from_config(settings)

    def steps(self, num_steps: int, device: torch.device, name: str | None = None) -> Any:
        """A scheduler of the library with the times of ``num_steps`` steps.

        Raises:
            UserError: it makes none.
        """
        assert_steps(num_steps)
        scheduler = self.scheduler(name)
        try:
            scheduler.set_timesteps(num_steps, device=device)
        except Exception as error:
            raise UserError(
                _WHERE, f"no times for {num_steps} steps ({type(error).__name__}: {error})", "a number it can make"
            ) from error
        return scheduler

    def check(self, num_steps: int, name: str | None = None) -> None:
        """Take one step on a blank latent: some schedulers refuse a prediction, or want more than it, only there.

        Raises:
            UserError: there is no such step, or it goes along other noise than the network is trained with.
        """
        where = "objective.sampler" if name else _WHERE
        with torch.device("cpu"):
            scheduler, table = self.steps(num_steps, torch.device("cpu"), name), self.training.alphas_cumprod
            own, blank = scheduler.alphas_cumprod, torch.zeros(1, 1, 2, 2)
            # the last one aside, at which some schedulers keep away from pure noise
            if len(own) != len(table) or not torch.allclose(own[:-1].to(table.dtype), table[:-1], atol=1e-5):
                found = f"{type(scheduler).__name__} with {len(own)} steps of noise of its own"
                raise UserError(where, found, f"the {len(table)} that the network is trained with", "state its `beta` settings")
            try:
                take_step(scheduler, blank, scheduler.timesteps[0], blank, drawn_for(scheduler, blank))
            except Exception as error:
                found = f"a {type(scheduler).__name__} that makes no step ({type(error).__name__}: {error})"
                raise UserError(where, found, f"one for a network that predicts '{scheduler.config.prediction_type}'") from error


class DiscreteDiffusion(DecoderObjective):
    """Denoising diffusion with the steps, the noise and the prediction of the decoder's release, as the library trains and samples.

    At a uniform step t the network sees ``sqrt(a_t) latent + sqrt(1 - a_t) noise`` and predicts the noise, v
    (``sqrt(a_t) noise - sqrt(1 - a_t) latent``) or the latent, as the scheduler's ``prediction_type`` says; the loss is the mean
    squared error, all steps weigh 1. The denoiser is called with the integer step. A network that predicts its variance too is
    trained on the mean alone. Sampling is the library's own scheduler, step by step; where that draws noise, a row's comes from
    the noise it starts from, so that an image does not depend on the others of its batch.

    Reference: Ho et al., 2020, arXiv 2006.11239; Salimans and Ho, 2022, arXiv 2202.00512 (v).

    Args:
        num_steps: of sampling, 50 as in the pipelines of Stable Diffusion.
        sampler: class of the library's schedulers to sample with (``DDIMScheduler``, ``DPMSolverMultistepScheduler`` …), on the
            release's noise; None is the release's own. Where ``eta`` is a choice, it is 0 as in the library's pipelines.
        schedule: None is the decoder's own, that of its release.

    Raises:
        ValueError: fewer than one step.
    """

    def __init__(self, num_steps: Count = 50, sampler: str | None = None, schedule: DiscreteSchedule | None = None) -> None:
        assert_steps(num_steps)
        self.num_steps, self.sampler, self.schedule = num_steps, sampler, schedule

    def match(self, own: ReleaseSchedule | None) -> None:
        """See ``DecoderObjective``."""
        if not isinstance(own, DiscreteSchedule | None):
            raise own.refused_by(self)
        self.schedule = self.schedule or own
        self.known.check(self.num_steps, self.sampler)  # now, and not in the first validation

    @property
    def known(self) -> DiscreteSchedule:
        """The schedule, Stable Diffusion 1.5's where neither the objective nor the decoder says one."""
        self.schedule = self.schedule or DiscreteSchedule()
        return self.schedule

    def losses(self, denoiser: Predictor, latents: Tensor, condition: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """As ``Objective.losses``, one draw per sample: ``[1, B]``."""
        latents, steps = at_least_float32(latents), int(self.known.training.config.num_train_timesteps)
        index = torch.randint(0, steps, (len(latents),), generator=generator, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return self.losses_at(denoiser, latents, condition, index, noise)[None]

    def losses_at(self, denoiser: Predictor, latents: Tensor, condition: Tokens, index: Tensor, noise: Tensor) -> Tensor:
        """The loss at given steps ``[B]`` and noise ``[B, C, h, w]``: ``[B]``."""
        table = self.known.training
        prediction = table.config.prediction_type
        target = latents if prediction == "sample" else noise
        if prediction == "v_prediction":
            target = table.get_velocity(latents, noise, index)
        predicted = denoiser(table.add_noise(latents, noise, index), index, condition).to(target.dtype)
        return (predicted - target).square().flatten(1).mean(dim=1)

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
        scheduler = self.known.steps(num_steps or self.num_steps, device, self.sampler)
        drawn = drawn_for(scheduler, x)
        x = x * scheduler.init_noise_sigma
        for step in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, step)
            predicted = denoiser(seen, step.expand(len(x)), condition).to(x.dtype)
            x = take_step(scheduler, predicted, step, x, drawn)
        return x


def drawn_for(scheduler: Any, noise: Tensor) -> dict[str, Any]:
    """What a scheduler's steps draw their noise by: a generator of each row, and no noise at all (``eta``) where that is a choice.

    The library's pipelines pass ``eta`` 0 unless they are told another.
    """
    taken = inspect.signature(scheduler.step).parameters
    rows = [torch.Generator().manual_seed(_seed_of(row)) for row in noise]
    return {key: value for key, value in (("generator", rows), ("eta", 0.0)) if key in taken}


def take_step(scheduler: Any, predicted: Tensor, step: Tensor, x: Tensor, drawn: Mapping[str, Any]) -> Tensor:
    """The next latent ``[B, C, h, w]``."""
    after: Tensor = scheduler.step(predicted, step, x, **drawn, return_dict=False)[0]
    return after


def _seed_of(noise: Tensor) -> int:
    """A seed that the noise of a row decides."""
    return int.from_bytes(noise.flatten()[:2].float().cpu().numpy().tobytes()) & (2**63 - 1)
