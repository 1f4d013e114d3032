"""Noise prediction whose variance is learned between its two bounds, as MAR's release trains and samples its tokens."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from umm_zoo.backbones.devices import send
from umm_zoo.batch import Tokens
from umm_zoo.objectives.base import Predictor
from umm_zoo.objectives.gaussian import GaussianNoisePrediction, repeated


class LearnedRangeVariance(GaussianNoisePrediction):
    """Noise prediction by a network that gives twice the channels: the noise, then where the log variance lies in its range.

    A number v in [-1, 1] stands for ``(v + 1)/2 log beta + (1 - v)/2 log beta~``. The loss of a copy is the mean squared error of
    the noise and, unscaled, the variational bound's term of its step in bits, in which the predicted noise gets no gradient.

    Reference: Nichol and Dhariwal, 2021, arXiv 2102.09672, section 3.1; MAR's ``diffloss.py`` uses the bound unscaled.
    """

    def losses_at(self, denoiser: Predictor, latents: Tensor, condition: Tokens, t: Tensor, noise: Tensor) -> Tensor:
        """As the base class, with the bound."""
        condition = repeated(condition, len(latents) // len(condition.values))
        noisy = self.process.noised(latents, t, noise)
        with torch.autocast(latents.device.type, enabled=False):
            predicted, v = denoiser(noisy, t, condition).to(noise.dtype).chunk(2, dim=1)
        error = (noise - predicted).square().flatten(1).mean(dim=1)
        clean = self.process.clean_from_noise(noisy, t, predicted.detach())
        mean, log_variance = self.process.posterior_mean(clean, noisy, t), self.log_variance(v, t, full=True)
        true_mean = self.process.posterior_mean(latents, noisy, t)
        _, low = self._bounds(self.process.betas, self.process.posterior_variance, t, noisy)
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + (true_mean - mean).square() * (-log_variance).exp())
        nll = -discretised_log_likelihood(latents, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, nll.flatten(1).mean(dim=1), kl.flatten(1).mean(dim=1)) / math.log(2)
        return error + bound

    def log_variance(self, v: Tensor, t: Tensor, full: bool = False) -> Tensor:
        """Of the steps at positions ``t`` among those of training (``full``) or of sampling."""
        process = self.process if full else self.sampling_process
        high, low = self._bounds(process.betas, process.posterior_variance, t, v)
        return low + (v + 1) / 2 * (high - low)

    @staticmethod
    def _bounds(betas: np.ndarray, posterior: np.ndarray, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``log beta`` and ``log beta~`` (at step 0 that of step 1), shaped to go with ``like``."""
        first = posterior[1] if len(posterior) > 1 else betas[0]
        tables = np.log(betas), np.log(np.append(first, posterior[1:]))
        high, low = (send(torch.from_numpy(table).to(like.dtype), t.device)[t] for table in tables)
        shape = (-1, *[1] * (like.ndim - 1))
        return high.reshape(shape), low.reshape(shape)

    def denoise_step(self, denoiser: Predictor, x: Tensor, step: int, condition: Tokens, noise: Tensor) -> Tensor:
        """As the base class, under the learned variance."""
        process = self.sampling_process
        index, position = (torch.full((len(x),), number, device=x.device) for number in (process.indices[step], step))
        with torch.autocast(x.device.type, enabled=False):
            predicted, v = denoiser(x, index, condition).to(x.dtype).chunk(2, dim=1)
        clean = process.clean_from_noise(x, position, predicted)
        clean = clean if self.clip is None else clean.clamp(-self.clip, self.clip)
        spread = (0.5 * self.log_variance(v, position)).exp() if step else 0.0
        return process.posterior_mean(clean, x, position) + spread * self.temperature * noise


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability under a Gaussian of the interval of 1/255 to each side of x; open beyond -.999 and .999."""
    centred, inverse = x - mean, (-log_scale).exp()
    upper, lower = _cdf(inverse * (centred + 1 / 255)), _cdf(inverse * (centred - 1 / 255))
    middle = (upper - lower).clamp(min=1e-12).log()
    first, last = upper.clamp(min=1e-12).log(), (1 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, middle))


def _cdf(x: Tensor) -> Tensor:
    """The standard normal distribution function, in the release's approximation by a tanh."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
