"""Denoising diffusion in discrete time with noise prediction, as ROSS's release trains and samples it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from umm_zoo.backbones.devices import send
from umm_zoo.batch import Tokens
from umm_zoo.errors import Count, Weight
from umm_zoo.objectives.base import Objective, Predictor, Shape, at_least_float32, shape_of


def cosine_betas(num_timesteps: int = 1000) -> np.ndarray:
    """``beta_i = min(1 - f((i+1)/T) / f(i/T), 0.999)`` with ``f(u) = cos^2((u + 0.008) / 1.008 * pi / 2)``, in float64.

    Reference: Nichol and Dhariwal, 2021, arXiv 2102.09672; 1,000 steps in ROSS's release. Index 0 is already one step of noise.
    """

    def signal(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_timesteps)
    return np.array([min(1 - signal((i + 1) / num_timesteps) / signal(i / num_timesteps), 0.999) for i in steps])


def spaced_indices(num_kept: int, last: int) -> list[int]:
    """``num_kept`` indices spread evenly over 0..last, both ends included.

    Raises:
        ValueError: ``num_kept`` is not in 1..last + 1.
    """
    if not 1 <= num_kept <= last + 1:
        raise ValueError(f"sampling_steps: found {num_kept}, expected 1..{last + 1} for the first index {last}")
    stride = last / (num_kept - 1) if num_kept > 1 else 1.0
    indices, position = [], 0.0
    for _ in range(num_kept):
        indices.append(round(position))
        position += stride  # added up rather than multiplied, as the release does: ties then fall on the same side
    return indices


class GaussianProcess:
    """The tables of a discrete Gaussian diffusion, and what follows from them in closed form.

    Everything is kept in float64 and cast when it meets a tensor; the model's own variance is fixed to beta ("fixed large"), with
    the posterior variance of step 1 at step 0.

    Args:
        betas: variances of the forward steps, ``[T]``.
        indices: what the network gets for each step, ``[T]``; the step's own number where nothing was respaced.

    Attributes:
        betas, alphas_bar, posterior_variance, mean_of_x0, mean_of_xt, sampling_variance: tables ``[T]``.
    """

    def __init__(self, betas: np.ndarray, indices: list[int] | None = None) -> None:
        self.betas = np.asarray(betas, dtype=np.float64)
        self.indices = list(range(len(self.betas))) if indices is None else indices
        alphas = 1.0 - self.betas
        self.alphas_bar = np.cumprod(alphas)
        previous = np.append(1.0, self.alphas_bar[:-1])
        self.posterior_variance = self.betas * (1.0 - previous) / (1.0 - self.alphas_bar)
        first = self.posterior_variance[1] if len(self.betas) > 1 else self.betas[0]
        self.mean_of_x0 = self.betas * np.sqrt(previous) / (1.0 - self.alphas_bar)
        self.mean_of_xt = (1.0 - previous) * np.sqrt(alphas) / (1.0 - self.alphas_bar)
        self.sampling_variance = np.append(first, self.betas[1:])

    def respaced(self, indices: list[int]) -> GaussianProcess:
        """The process on a subset of steps: betas from ratios of the kept alphas_bar; the network still gets the old indices."""
        kept = self.alphas_bar[indices]
        return GaussianProcess(1.0 - kept / np.append(1.0, kept[:-1]), indices)

    def noised(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise``; ``t`` is ``[B]``."""
        return _at(np.sqrt(self.alphas_bar), t, clean) * clean + _at(np.sqrt(1.0 - self.alphas_bar), t, clean) * noise

    def clean_from_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x0`` that ``noise`` would have turned into ``x``."""
        return _at(np.sqrt(1.0 / self.alphas_bar), t, x) * x - _at(np.sqrt(1.0 / self.alphas_bar - 1.0), t, x) * noise

    def posterior_mean(self, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Mean of ``q(x_{t-1} | x_t, x0)``."""
        return _at(self.mean_of_x0, t, x) * clean + _at(self.mean_of_xt, t, x) * x

    def step(self, x: Tensor, t: Tensor, predicted: Tensor, noise: Tensor, clip: float | None = None) -> Tensor:
        """One ancestral step from ``x_t`` to ``x_{t-1}``; nothing is added at index 0."""
        clean = self.clean_from_noise(x, t, predicted)
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        spread = _at(np.sqrt(self.sampling_variance), t, x) * (t != 0).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return self.posterior_mean(clean, x, t) + spread * noise


def _at(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """``table[t]``, shaped to multiply ``like``: gathered in float64, cast to float32 (float64 where ``like`` is)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = send(torch.from_numpy(table).to(dtype), t.device)[t]  # [B]
    return values.reshape(-1, *[1] * (like.ndim - 1))


class GaussianNoisePrediction(Objective):
    """Prediction of a noised latent's noise at a random step: the objective of ROSS's denoising variant.

    Each latent is repeated ``num_draws`` times, copy after copy along the batch, with its condition; every copy gets its own step,
    uniform over 0..T-1, and its own noise. The loss of a copy is the mean squared error of the noise, without any weighting of
    steps; the variance is not learned. Released code; the paper's main text states neither T (1,000 there), the schedule nor the
    number of draws.

    Sampling is ancestral, over all steps, from pure noise, without clipping, as in the release. Its first step multiplies an error
    of the prediction by 31.6, so images come out better with ``first_index`` 998 or with ``clip``.

    Reference: Wang et al., 2024, arXiv 2410.09575; Ho et al., 2020, arXiv 2006.11239.

    Args:
        num_draws: random steps per latent and update.
        sampling_steps: steps kept when sampling.
        first_index: the noisiest index sampling starts from; None is T - 1.
        clip: bound on the predicted clean latent while sampling; None for no bound.
        temperature: factor on the noise that sampling adds (not on that it starts from): MAR's.

    Raises:
        ValueError: the sampling steps do not fit the first index.
    """

    def __init__(
        self,
        num_draws: Count = 4,
        sampling_steps: Count = 1000,
        first_index: int | None = None,
        clip: Weight | None = None,
        temperature: Weight = 1.0,
    ) -> None:
        self.process = GaussianProcess(cosine_betas())
        largest = len(self.process.betas) - 1
        last = largest if first_index is None else first_index
        if not 0 <= last <= largest:
            raise ValueError(f"first_index: found {last}, expected 0..{largest}")
        self.num_draws, self.clip, self.temperature = num_draws, clip, temperature
        self.sampling_process = self.process.respaced(spaced_indices(sampling_steps, last))

    def losses(self, denoiser: Predictor, latents: Tensor, condition: Tokens, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the noise, ``[num_draws, B]``."""
        latents = at_least_float32(latents).repeat(self.num_draws, 1, 1, 1)  # [R*B, C, h, w]
        steps = len(self.process.betas)
        t = torch.randint(0, steps, (len(latents),), generator=generator, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return self.losses_at(denoiser, latents, condition, t, noise).unflatten(0, (self.num_draws, -1))

    def losses_at(self, denoiser: Predictor, latents: Tensor, condition: Tokens, t: Tensor, noise: Tensor) -> Tensor:
        """The loss at given steps ``[R*B]`` and noise, latents already repeated; ``[R*B]``."""
        copies = len(latents) // len(condition.values)
        condition = repeated(condition, copies)
        # like the release, outside any low-precision autocast: the noise at small t is lost in bfloat16
        with torch.autocast(latents.device.type, enabled=False):
            predicted = denoiser(self.process.noised(latents, t, noise), t, condition)
        errors = (noise - predicted.to(noise.dtype)).square()  # [R*B, C, h, w]
        return errors.flatten(1).mean(dim=1)

    @property
    def num_noises(self) -> int:
        """Draws of noise that a sample is made of: one to start from, and one for each step."""
        return len(self.sampling_process.betas) + 1

    @torch.no_grad()
    def sample(
        self,
        denoiser: Predictor,
        shape: Shape,
        condition: Tokens,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Ancestral sampling from pure noise to ``[B, C, h, w]``.

        ``noise`` ``[num_noises, B, C, h, w]`` takes the place of draws from the generator, so that rows may have their own.
        """
        device = condition.values.device
        drawn = (torch.randn(shape, generator=generator, device=device) for _ in range(self.num_noises))
        noises = drawn if noise is None else iter(noise)
        x = next(noises)
        for step in reversed(range(len(self.sampling_process.betas))):
            x = self.denoise_step(denoiser, x, step, condition, next(noises))
        return x

    def sample_from(self, denoiser: Predictor, noise: Tensor, condition: Tokens) -> Tensor:
        """As the base class."""
        return self.sample(denoiser, shape_of(noise), condition, noise=noise)

    def denoise_step(self, denoiser: Predictor, x: Tensor, step: int, condition: Tokens, noise: Tensor) -> Tensor:
        """One step of ``sample``, from the given position in the kept steps and with the given noise."""
        index = torch.full((len(x),), self.sampling_process.indices[step], device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            predicted = denoiser(x, index, condition).to(x.dtype)
        position = torch.full((len(x),), step, device=x.device)
        return self.sampling_process.step(x, position, predicted, self.temperature * noise, self.clip)


def repeated(condition: Tokens, copies: int) -> Tokens:
    """The conditions, copy after copy along the batch."""
    mask = None if condition.mask is None else condition.mask.repeat(copies, 1)
    return Tokens(at_least_float32(condition.values).repeat(copies, 1, 1), mask)
