"""The discrete Gaussian process and noise prediction, against closed forms and an independent derivation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.references.ross_reference import alpha_bar
from umm_zoo.batch import Tokens
from umm_zoo.blocks.denoisers import DenoiserHead
from umm_zoo.objectives.gaussian import GaussianNoisePrediction, GaussianProcess, cosine_betas, spaced_indices
from umm_zoo.objectives.reduction import MeanOverImages, ReleasedReduction

PROCESS = GaussianProcess(cosine_betas())


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def condition(rows: int, tokens: int = 4, width: int = 8) -> Tokens:
    return Tokens(torch.randn(rows, tokens, width))


# beta, alpha_bar, posterior variance, coefficient of x0, coefficient of x_t
TABLE = {
    0: (4.1284224822e-05, 0.999958715775, 0.0, 1.0, 0.0),
    1: (4.61417527367e-05, 0.999912575927, 2.17894961457e-05, 0.527781409334, 0.472218590427),
    100: (0.000531899155698, 0.971575681808, 0.00052222359272, 0.0184498608049, 0.981548256864),
    500: (0.00315569144159, 0.492285172449, 0.00314600512546, 0.00436786689953, 0.995356279455),
    998: (0.749999392901, 2.42876690703e-06, 0.749993928184, 0.00233767618982, 0.499996963947),
    999: (0.999, 2.42876690703e-09, 0.998997576088, 0.00155689171549, 0.0316226998741),
}


@pytest.mark.parametrize("i", TABLE)
def test_tables_at_listed_steps(i):
    p = PROCESS
    found = [float(t[i]) for t in (p.betas, p.alphas_bar, p.posterior_variance, p.mean_of_x0, p.mean_of_xt)]
    assert_close(doubles(*found), doubles(*TABLE[i]), rtol=1e-10, atol=1e-15)


def test_schedule_is_the_telescoped_cosine_with_one_clipped_beta():
    expected = doubles(*(alpha_bar(i) for i in range(1000)))
    assert_close(torch.from_numpy(PROCESS.alphas_bar), expected, rtol=1e-9, atol=1e-15)
    betas = torch.from_numpy(PROCESS.betas)
    assert (betas == 0.999).sum() == 1 and (betas.diff() > 0).all()
    assert_close(betas.sum(), torch.tensor(12.441496417056, dtype=torch.float64), rtol=1e-12, atol=0)
    assert PROCESS.alphas_bar[999] / PROCESS.alphas_bar[998] == pytest.approx(0.001, rel=1e-12)
    snr = PROCESS.alphas_bar / (1 - PROCESS.alphas_bar)
    assert [snr[0], snr[500], snr[999]] == pytest.approx([24221.3271555, 0.969609603137, 2.42876691e-09], rel=1e-8)


def test_forward_process():
    x0, noise = doubles(1, -2)[None, :, None, None], doubles(0.5, 1)[None, :, None, None]
    expected = {
        0: (1.003191997742, -1.993533435213),
        1: (1.004631329057, -1.990562489919),
        500: (1.057900920327, -0.690719628919),
        999: (0.500049281914, 0.999901433743),
    }
    for t, values in expected.items():
        assert_close(PROCESS.noised(x0, torch.tensor([t]), noise).flatten(), doubles(*values), rtol=1e-11, atol=0)


def test_moments_of_the_forward_process():
    generator = torch.Generator().manual_seed(0)
    x0, t = torch.full((40000, 1, 1, 1), 1.7), torch.full((40000,), 500)
    noised = PROCESS.noised(x0, t, torch.randn(x0.shape, generator=generator))
    assert float(noised.mean()) == pytest.approx(1.7 * 0.701630367394, abs=4 * math.sqrt(0.5077 / 40000))
    assert float(noised.var()) == pytest.approx(0.507714827551, rel=0.03)


def test_posterior():
    one = torch.tensor([500])
    mean = PROCESS.posterior_mean(doubles(1), doubles(0.5), one)
    assert_close(mean, doubles(0.502046006627), rtol=1e-11, atol=0)
    first = torch.tensor([0])
    assert_close(PROCESS.posterior_mean(doubles(0.3), doubles(9), first), doubles(0.3), rtol=1e-12, atol=0)
    assert PROCESS.sampling_variance[0] == pytest.approx(2.17894961457e-05, rel=1e-11)
    assert (PROCESS.sampling_variance[1:] == PROCESS.betas[1:]).all()


def test_posterior_keeps_the_marginals():
    bar = torch.from_numpy(PROCESS.alphas_bar)
    before = torch.cat([doubles(1), bar[:-1]])
    c1, c2, v = (torch.from_numpy(t) for t in (PROCESS.mean_of_x0, PROCESS.mean_of_xt, PROCESS.posterior_variance))
    assert_close(c1 + c2 * bar.sqrt(), before.sqrt(), rtol=0, atol=1e-11)
    assert_close(c2**2 * (1 - bar) + v, 1 - before, rtol=0, atol=1e-14)


def test_posterior_against_bayes():
    t, x0, xt = 321, 0.7, -0.4
    before, beta = alpha_bar(t - 1), 1 - alpha_bar(t) / alpha_bar(t - 1)
    precision = 1 / (1 - before) + (1 - beta) / beta  # prior of x_{t-1} given x0, times likelihood of x_t
    mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(1 - beta) * xt / beta) / precision
    assert float(PROCESS.posterior_mean(doubles(x0), doubles(xt), torch.tensor([t]))) == pytest.approx(mean, rel=1e-9)
    assert PROCESS.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-9)


def test_clean_from_noise():
    assert_close(
        PROCESS.clean_from_noise(doubles(0.5), torch.tensor([500]), doubles(0.25)), doubles(0.458738302233), rtol=1e-11, atol=0
    )
    t = torch.arange(999)
    x0, noise = torch.randn(999, 2, 1, 1, dtype=torch.float64), torch.randn(999, 2, 1, 1, dtype=torch.float64)
    assert_close(PROCESS.clean_from_noise(PROCESS.noised(x0, t, noise), t, noise), x0, rtol=0, atol=1e-9)


def seen_noise(objective: GaussianNoisePrediction, x0: Tensor):
    """A network that knows the clean latents, so it can say exactly which noise it is shown."""

    def predict(noisy: Tensor, t: Tensor, condition: Tokens) -> Tensor:
        bar = torch.tensor([alpha_bar(int(i)) for i in t], dtype=torch.float64)[:, None, None, None]
        clean = x0.repeat(len(noisy) // len(x0), 1, 1, 1).double()
        return ((noisy.double() - bar.sqrt() * clean) / (1 - bar).sqrt()).to(noisy.dtype)

    return predict


def test_loss_of_known_predictions():
    objective, x0 = GaussianNoisePrediction(), torch.randn(3, 8, 2, 2, dtype=torch.float64)
    t, noise = torch.randint(0, 1000, (12,)), torch.randn(12, 8, 2, 2, dtype=torch.float64)
    many = x0.repeat(4, 1, 1, 1)

    def loss(stub):
        return objective.losses_at(stub, many, condition(3), t, noise)

    assert_close(loss(lambda x, t, c: noise), torch.zeros(12).double(), rtol=0, atol=0)
    assert_close(loss(lambda x, t, c: torch.zeros_like(x)), noise.square().mean((1, 2, 3)))
    assert_close(loss(lambda x, t, c: noise + 0.1), torch.full((12,), 0.01).double())


def test_fresh_head_has_the_loss_of_predicting_zero():
    objective, head = GaussianNoisePrediction(), DenoiserHead(8, 2, 8, width=16, depth=2)
    x0, t, noise, c = torch.randn(3, 8, 2, 2), torch.tensor([0, 500, 999]), torch.randn(3, 8, 2, 2), condition(3)
    zero = objective.losses_at(lambda x, t, c: torch.zeros_like(x), x0, c, t, noise)
    assert torch.equal(objective.losses_at(head, x0, c, t, noise), zero)


def test_unconditional_optimum_has_the_mean_of_alpha_bar():
    generator = torch.Generator().manual_seed(0)
    objective = GaussianNoisePrediction(num_draws=8)

    def optimum(x, t, c):
        bar = torch.tensor([alpha_bar(int(i)) for i in t])[:, None, None, None]
        return (1 - bar).sqrt() * x

    losses = objective.losses(optimum, torch.randn(500, 16, 2, 2, generator=generator), condition(500), generator)
    assert float(losses.mean()) == pytest.approx(0.495577512582, abs=4 * float(losses.std()) / math.sqrt(losses.numel()))
    assert float(PROCESS.alphas_bar.mean()) == pytest.approx(0.495577512582, rel=1e-11)


def test_draws_are_copies_of_the_batch_one_after_another():
    objective, calls = GaussianNoisePrediction(num_draws=4), []

    def spy(noisy, t, c):
        calls.append((noisy, t, c.values))
        return torch.zeros_like(noisy)

    x0, c = torch.zeros(3, 2, 2, 2), condition(3)
    assert objective.losses(spy, x0, c).shape == (4, 3)
    noisy, t, states = calls[0]
    assert len(calls) == 1 and t.dtype == torch.int64 and len(set(t.tolist())) > 3
    for copy in range(4):
        assert torch.equal(states[3 * copy : 3 * copy + 3], c.values)
    bar = torch.tensor([alpha_bar(int(i)) for i in t])
    assert_close((noisy / (1 - bar).sqrt()[:, None, None, None]).std(), torch.tensor(1.0), atol=0.4, rtol=0)


def test_steps_are_uniform_and_draws_only_shrink_the_variance():
    generator, seen = torch.Generator().manual_seed(1), []

    def spy(noisy, t, c):
        seen.append(t)
        return torch.zeros_like(noisy)

    x0, c = torch.zeros(2500, 1, 1, 1), condition(2500, 1, 2)
    four = GaussianNoisePrediction(num_draws=4).losses(spy, x0, c, generator)
    t = seen[0]
    assert len(set(t.tolist())) > 990 and t.min() >= 0 and t.max() <= 999
    assert float(t.float().mean()) == pytest.approx(499.5, abs=3 * 288.675 / math.sqrt(len(t)))
    one = GaussianNoisePrediction(num_draws=1).losses(spy, x0, c, generator)
    assert float(four.mean(0).var() / one.mean(0).var()) == pytest.approx(0.25, rel=0.2)


def test_sampling_with_the_exact_noise_returns_the_data():
    objective = GaussianNoisePrediction(sampling_steps=50, first_index=998)
    x0 = torch.randn(2, 4, 2, 2)
    generated = objective.sample(seen_noise(objective, x0), (2, 4, 2, 2), condition(2), torch.Generator().manual_seed(0))
    assert_close(generated, x0, rtol=0, atol=2e-4)


def test_clipping_bounds_the_first_step():
    def wrong(x, t, c):
        return x + 0.01  # at index 999 this is an error of 0.01 * 20291 in the clean latent

    free, clipped = (GaussianNoisePrediction(sampling_steps=2, clip=clip) for clip in (None, 1.0))
    noise = torch.zeros(1, 1, 1, 1)
    x = torch.ones(1, 1, 1, 1)
    assert free.denoise_step(wrong, x, 1, condition(1, 1), noise).abs() > 100
    assert clipped.denoise_step(wrong, x, 1, condition(1, 1), noise).abs() <= 1.001


def test_no_noise_is_added_at_index_zero():
    objective, x = GaussianNoisePrediction(), torch.randn(1, 2, 2, 2)
    steps = [objective.denoise_step(lambda x, t, c: 0 * x, x, 0, condition(1), noise) for noise in (0 * x, 5 * torch.ones_like(x))]
    assert torch.equal(*steps)
    assert_close(steps[0], x / math.sqrt(alpha_bar(0)))


def test_respacing():
    assert spaced_indices(10, 999) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    betas = [4.128422e-05, 0.0343731996, 0.0927217232, 0.1530510491, 0.2193392068]
    betas += [0.2971582215, 0.3957355748, 0.5325223842, 0.7423681744, 0.9999999180]
    kept = PROCESS.respaced(spaced_indices(10, 999))
    assert kept.betas.tolist() == pytest.approx(betas, rel=1e-6)
    assert PROCESS.respaced(spaced_indices(1000, 999)).betas == pytest.approx(PROCESS.betas, rel=1e-9)
    with pytest.raises(ValueError, match=r"found 1001, expected 1\.\.1000"):
        spaced_indices(1001, 999)


def test_network_gets_the_original_index():
    seen = []
    objective = GaussianNoisePrediction(sampling_steps=4)

    def spy(x, t, c):
        seen.append(int(t[0]))
        return torch.zeros_like(x)

    objective.sample(spy, (1, 1, 1, 1), condition(1, 1))
    assert seen == [999, 666, 333, 0]


def test_reductions():
    losses, mask = torch.tensor([[1.0, 3.0]]).repeat(4, 1), torch.tensor([False, True])
    assert float(MeanOverImages()(losses, mask)) == 3.0
    assert_close(ReleasedReduction()(losses.double(), mask), torch.tensor(1.9999995, dtype=torch.float64))
    for reduction in (MeanOverImages(), ReleasedReduction()):
        assert float(reduction(losses, torch.tensor([False, False]))) == 0.0
    both = torch.tensor([True, True])
    assert float(MeanOverImages()(losses, both)) == 2.0
    assert_close(ReleasedReduction()(losses.double(), both), torch.tensor(1.99999975, dtype=torch.float64), rtol=1e-9, atol=0)


def test_wrong_first_index_is_refused():
    with pytest.raises(ValueError, match="first_index"):
        GaussianNoisePrediction(first_index=1000)
