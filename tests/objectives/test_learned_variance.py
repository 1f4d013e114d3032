"""Learned-range variance against numeric integration and closed forms, and noise of rows of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from umm_zoo.batch import Tokens
from umm_zoo.objectives.gaussian import GaussianNoisePrediction
from umm_zoo.objectives.learned_variance import LearnedRangeVariance, discretised_log_likelihood

V = 0.4


def denoiser(noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
    return torch.cat([0.5 * noisy, torch.full_like(noisy, V)], dim=1)


def rows(count: int) -> tuple[Tensor, Tokens, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, count, 3, 1, 1, generator=generator, dtype=torch.float64)
    return latents, Tokens(torch.zeros(count, 1, 2, dtype=torch.float64)), noise


def test_alphas_of_the_cosine_schedule() -> None:
    found = LearnedRangeVariance().process.alphas_bar[[0, 249, 499, 749]]
    assert found.tolist() == pytest.approx([0.999959, 0.847012, 0.493844, 0.144272], abs=1e-6)
    assert LearnedRangeVariance().process.alphas_bar[999] == pytest.approx(2.4e-9, rel=0.02)


def test_the_bound_is_the_divergence_of_two_gaussians_in_bits() -> None:
    own, (latents, condition, noise) = LearnedRangeVariance(num_draws=1), rows(4)
    t, process = torch.tensor([1, 40, 500, 900]), own.process
    noisy = process.noised(latents, t, noise)
    found = own.losses_at(denoiser, latents, condition, t, noise)
    for row, step in enumerate(t.tolist()):
        beta, posterior, bar = process.betas[step], process.posterior_variance[step], process.alphas_bar[step]
        log_variance = (V + 1) / 2 * math.log(beta) + (1 - V) / 2 * math.log(posterior)
        clean = (noisy[row] - math.sqrt(1 - bar) * 0.5 * noisy[row]) / math.sqrt(bar)
        true, made = (process.posterior_mean(x[None], noisy[[row]], t[[row]]) for x in (latents[row], clean))
        scales = torch.tensor([math.sqrt(posterior), math.exp(0.5 * log_variance)], dtype=torch.float64)
        bound = kl_divergence(Normal(true, scales[0]), Normal(made, scales[1])).mean() / math.log(2)
        error = (noise[row] - 0.5 * noisy[row]).square().mean()
        assert_close(found[row], error + bound, rtol=1e-4, atol=1e-6)


def test_the_first_step_is_a_likelihood_of_intervals() -> None:
    x, mean = torch.tensor([-1.0, -0.2, 0.3, 1.0], dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    found = discretised_log_likelihood(x, mean, torch.tensor(math.log(0.7), dtype=torch.float64))
    cdf = Normal(mean, 0.7).cdf
    inner = (cdf(x + 1 / 255) - cdf(x - 1 / 255)).log()
    expected = torch.cat([cdf(x[:1] + 1 / 255).log(), inner[1:3], (1 - cdf(x[3:] - 1 / 255)).log()])
    assert_close(found, expected, atol=0.05, rtol=0)  # the release approximates the distribution function


def test_the_variance_term_gives_the_noise_no_gradient() -> None:
    own, (latents, condition, noise) = LearnedRangeVariance(num_draws=1), rows(2)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    network = lambda x, t, c: torch.cat([scale * x, torch.full_like(x, V)], 1)  # noqa: E731
    t = torch.tensor([30, 300])
    own.losses_at(network, latents, condition, t, noise).sum().backward()
    x = own.process.noised(latents, t, noise)
    assert_close(scale.grad, (-2 * (noise - 0.5 * x) * x).flatten(1).mean(1).sum())


@pytest.mark.parametrize("kind", [GaussianNoisePrediction, LearnedRangeVariance])
def test_given_noise_makes_a_row_independent_of_others_and_temperature_scales_what_is_added(kind: type) -> None:
    network = denoiser if kind is LearnedRangeVariance else lambda x, t, c: 0.5 * x
    own = kind(sampling_steps=5, first_index=900)
    noise = torch.randn(own.num_noises, 4, 3, 1, 1)
    condition = Tokens(torch.zeros(4, 1, 2))
    together = own.sample(network, (4, 3, 1, 1), condition, noise=noise)
    alone = own.sample(network, (1, 3, 1, 1), Tokens(condition.values[[2]]), noise=noise[:, [2]])
    assert own.num_noises == 6
    assert_close(alone, together[[2]])
    cold, still = kind(sampling_steps=5, first_index=900, temperature=0.0), noise.clone()
    still[1:] = 0
    assert_close(
        cold.sample(network, (4, 3, 1, 1), condition, noise=noise), own.sample(network, (4, 3, 1, 1), condition, noise=still)
    )
