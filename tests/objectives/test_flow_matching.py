"""Flow matching against values worked out by hand and closed-form minimisers."""

import math

import pytest
import torch
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from umm_zoo.batch import Tokens
from umm_zoo.objectives.flow_matching import ContrastiveFlowMatching, FlowMatching
from umm_zoo.objectives.guidance import Branch, GuidedDenoiser, guide, guide_edit
from umm_zoo.objectives.schedules import EvenlySpaced, LibrarySchedule
from umm_zoo.objectives.solvers import DPMSolver, Euler
from umm_zoo.objectives.times import LogitNormalTimes, ShiftedTimes, TimeSampler, UniformTimes, shifted

NOTHING = Tokens(torch.zeros(3, 1, 2))


class Fixed(TimeSampler):
    def __call__(self, count, device, generator=None):
        return torch.full((count,), 0.25, device=device)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_interpolant_goes_straight_from_data_to_noise() -> None:
    data, noise = torch.full((3, 1, 1, 2), 2.0), torch.full((3, 1, 1, 2), -4.0)
    points = FlowMatching().interpolate(data, torch.tensor([0.0, 0.25, 1.0]), noise)
    assert points.noisy[:, 0, 0, 0].tolist() == [2.0, 0.5, -4.0] and (points.velocity == -6).all()


def test_the_loss_is_the_mean_squared_error_of_noise_minus_data() -> None:
    """A denoiser that solves for the noise, knowing the data, has none; one that says zero has the velocity's own square."""
    data, flow = torch.randn(3, 2, 2, 2, generator=generator()), FlowMatching(Fixed())

    def knows(noisy, time, condition):
        return (noisy - data) / time[:, None, None, None]

    assert float(flow(knows, data, NOTHING, generator(1))["loss"]) == pytest.approx(0, abs=1e-10)
    noise = torch.randn(data.shape, generator=generator(1))  # the fixed times draw nothing before it
    silent = flow(lambda x, t, c: torch.zeros_like(x), data, NOTHING, generator(1))
    torch.testing.assert_close(silent["loss"], (noise - data).square().mean())
    torch.testing.assert_close(silent["flow"], silent["loss"])


def test_contrast_of_weight_zero_is_flow_matching() -> None:
    data, net = torch.randn(3, 2, 2, 2), lambda x, t, c: 0.5 * x
    plain, contrast = FlowMatching(), ContrastiveFlowMatching(weight=0.0)
    torch.testing.assert_close(contrast(net, data, NOTHING, generator(4))["loss"], plain(net, data, NOTHING, generator(4))["loss"])


def test_contrast_subtracts_the_error_against_the_other_sample_and_logs_the_plain_one() -> None:
    data, net = torch.randn(2, 2, 2, 2), lambda x, t, c: 0.5 * x
    flow = ContrastiveFlowMatching(weight=0.05, times=Fixed())
    points = flow.draw(data, generator(4))
    own = (net(points.noisy, None, None) - points.velocity).square().mean()
    other = (net(points.noisy, None, None) - points.velocity.flip(0)).square().mean()  # of two samples, each other's
    values = flow(net, data, Tokens(torch.zeros(2, 1, 2)), generator(4))
    torch.testing.assert_close(values["loss"], own - 0.05 * other)
    torch.testing.assert_close(values["flow"], own)
    assert not values["flow"].requires_grad


def test_a_negative_is_never_the_sample_itself_and_every_other_sample_comes_up() -> None:
    velocity = torch.arange(5.0).reshape(5, 1, 1, 1)
    found = torch.stack([ContrastiveFlowMatching().negatives([velocity], generator(i))[0].flatten() for i in range(60)])
    for row in range(5):
        assert set(found[:, row].tolist()) == set(range(5)) - {row}


def test_a_batch_of_one_has_no_negative_while_training_and_does_no_harm_in_validation() -> None:
    flow, data, one = ContrastiveFlowMatching(), torch.zeros(1, 1, 2, 2), Tokens(torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="found a batch of one"):
        flow(lambda x, t, c: x, data, one)
    with torch.no_grad():
        assert flow(lambda x, t, c: x, data, one)["loss"].isfinite()


def test_the_minimiser_of_the_contrastive_loss_is_an_affine_map_of_the_plain_one() -> None:
    """One-dimensional data of two classes; at a fixed point the best constant velocity of a class is solved by least squares."""
    weight, count = 0.05, 200_000
    flow = ContrastiveFlowMatching(weight, times=Fixed())
    labels = torch.rand(count, generator=generator(0)) < 0.3
    data = torch.where(labels, 2.0, -1.0)[:, None, None, None]
    points = flow.draw(data, generator(1))
    negatives = flow.negatives([points.velocity], generator(2))[0]
    # v minimises mean((v - v+)^2 - w (v - v-)^2) over the members of a class: (mean v+ - w mean v-) / (1 - w)
    best = (points.velocity[labels].mean() - weight * negatives[labels].mean()) / (1 - weight)
    plain, mean = points.velocity[labels].mean(), data.mean()
    torch.testing.assert_close(best, (plain + weight * mean) / (1 - weight), atol=5e-3, rtol=0)


def test_uniform_times_fill_the_interval_evenly() -> None:
    times = UniformTimes()(20_000, torch.device("cpu"), generator())
    assert times.min() >= 0 and times.max() < 1 and abs(float(times.mean()) - 0.5) < 0.01


def test_the_median_of_logit_normal_times_is_the_logistic_of_the_mean() -> None:
    times = LogitNormalTimes(0.7, 1.3)(20_001, torch.device("cpu"), generator())
    assert float(times.median()) == pytest.approx(1 / (1 + math.exp(-0.7)), abs=0.01)
    assert float((times < 1 / (1 + math.exp(-(0.7 - 1.3)))).float().mean()) == pytest.approx(0.1587, abs=0.01)


def test_a_mean_of_diffusers_trainers_has_the_other_sign_here() -> None:
    """They look the draw up in a scheduler's times, which fall."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    draw = compute_density_for_timestep_sampling("logit_normal", 20_001, logit_mean=0.7, logit_std=1.0, generator=generator())
    theirs = scheduler.timesteps[(draw * 1000).long()] / 1000
    times = ShiftedTimes(3.0, LogitNormalTimes(-0.7))(20_001, torch.device("cpu"), generator())
    assert float(times.median()) == pytest.approx(float(theirs.median()), abs=0.01)


def test_a_shift_of_three_moves_one_half_to_three_quarters() -> None:
    assert shifted(0.5, 3.0) == 0.75 and shifted(0.0, 3.0) == 0 and shifted(1.0, 3.0) == 1
    times = ShiftedTimes(3.0)(20_001, torch.device("cpu"), generator())
    assert float(times.median()) == pytest.approx(0.75, abs=0.01)
    assert EvenlySpaced(3.0)(2, 4, 4) == ([1.0, 0.75, 0.0], [1.0, 0.75])


def gaussian(x: torch.Tensor, time: float, deviation: float = 0.2) -> torch.Tensor:
    """The velocity of data N(0, deviation^2): its flow carries noise z to deviation * z."""
    variance = (1 - time) ** 2 * deviation**2 + time**2
    return x * (time - (1 - time) * deviation**2) / variance


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (DPMSolver(), 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver, order: int) -> None:
    """Away from the ends, where the second order has its first-order steps; the exact flow goes with the deviation."""
    start = torch.ones(1, dtype=torch.float64)
    exact = ((0.9 * 0.2) ** 2 + 0.1**2) ** 0.5 / ((0.1 * 0.2) ** 2 + 0.9**2) ** 0.5  # from time 0.9 to 0.1

    def error(steps: int) -> float:
        return abs(float(solver(gaussian, start, torch.linspace(0.9, 0.1, steps + 1).tolist())) - exact)

    assert 0.7 * 2**order < error(100) / error(200) < 1.4 * 2**order


def test_one_step_of_either_solver_is_euler() -> None:
    noise = torch.randn(4, generator=generator())
    torch.testing.assert_close(DPMSolver()(gaussian, noise, [1.0, 0.0]), noise - gaussian(noise, 1.0))


def test_sampling_with_the_exact_velocity_reproduces_the_distribution() -> None:
    def denoiser(x, time, condition):
        return gaussian(x.double(), float(time[0])).float()

    flow = FlowMatching(num_steps=80)
    samples = flow.sample(denoiser, (3, 4, 32, 32), NOTHING, generator())
    assert float(samples.std()) == pytest.approx(0.2, rel=0.02)
    again = flow.sample(denoiser, (3, 4, 32, 32), NOTHING, noise=torch.randn((3, 4, 32, 32), generator=generator()))
    assert torch.equal(samples, again)


def mean_of(x, time, condition: Tokens):
    """A denoiser that answers with the mean of the valid condition tokens."""
    mask = torch.ones(condition.values.shape[:2]) if condition.mask is None else condition.mask.float()
    value = (condition.values[..., 0] * mask).sum(dim=1) / mask.sum(dim=1)
    return value[:, None, None, None].expand_as(x)


def tokens(value: float, length: int = 2) -> Tokens:
    return Tokens(torch.full((3, length, 1), value))


def test_guidance_is_the_stated_sum() -> None:
    x, time = torch.zeros(3, 1, 2, 2), torch.ones(3)
    assert (GuidedDenoiser(mean_of, guide(tokens(1.0), tokens(3.0), 4.0))(x, time) == 1 + 4 * (3 - 1)).all()
    edit = guide_edit(tokens(1.0), tokens(2.0), tokens(5.0), 2.0, 3.0)
    assert (GuidedDenoiser(mean_of, edit)(x, time) == 1 + 2 * (2 - 1) + 3 * (5 - 2)).all()


def test_three_terms_of_scale_one_are_the_edit_alone_in_one_call() -> None:
    calls = []

    def counted(x, time, condition):
        calls.append(len(x))
        return mean_of(x, time, condition)

    denoiser = GuidedDenoiser(counted, guide_edit(tokens(1.0), tokens(2.0), tokens(5.0), 1.0, 1.0))
    assert (denoiser(torch.zeros(3, 1, 2, 2), torch.ones(3)) == 5).all() and calls == [3]


def test_branches_of_different_lengths_are_padded_and_masked() -> None:
    masked = Tokens(torch.tensor([[[3.0], [100.0]]] * 3), torch.tensor([[True, False]] * 3))
    denoiser = GuidedDenoiser(mean_of, [Branch(tokens(1.0, 4), -1.0), Branch(masked, 2.0)])
    assert (denoiser(torch.zeros(3, 1, 2, 2), torch.ones(3)) == 5).all()


def test_weights_that_do_not_add_up_to_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found weights with the sum 1\.5, expected 1"):
        FlowMatching().sample(mean_of, (3, 1, 2, 2), [Branch(tokens(1.0), 1.5)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlowMatching(num_steps=0),
        lambda: ContrastiveFlowMatching(weight=1.0),
        lambda: ShiftedTimes(0.0),
        lambda: EvenlySpaced(0.0),
        lambda: LibrarySchedule()(0, 4, 4),
    ],
)
def test_values_out_of_range_are_refused(make) -> None:
    with pytest.raises(ValueError, match="found"):
        make()


def test_a_mean_over_groups_of_unequal_sizes_is_that_over_their_rows() -> None:
    """Each row's own mean over its cells, whatever their number; points as drawn group after group."""
    sizes, condition = ((2, 3, 4, 4), (1, 3, 2, 6)), Tokens(torch.zeros(1, 1, 1))
    groups = [(torch.randn(size, generator=generator(n)), condition) for n, size in enumerate(sizes)]
    found = FlowMatching().over_sizes(lambda noisy, time, _: 0.5 * noisy, groups, generator(7))
    source, errors = generator(7), []
    for latents, _ in groups:
        points = FlowMatching().draw(latents, source)
        errors += [float((0.5 * points.noisy[row] - points.velocity[row]).square().mean()) for row in range(len(latents))]
    assert float(found["loss"]) == pytest.approx(sum(errors) / 3) and found["flow"] == found["loss"]
    one = FlowMatching()(lambda noisy, time, _: 0.5 * noisy, *groups[0], generator(7))
    assert torch.equal(FlowMatching().over_sizes(lambda noisy, time, _: 0.5 * noisy, groups[:1], generator(7))["loss"], one["loss"])


def test_a_negative_of_another_size_is_cut_or_repeated() -> None:
    """Rows are told apart by their values: of a wide one and two tall ones every other comes up, never the row itself."""
    wide = 10 + torch.arange(6.0).view(1, 1, 1, 6)
    tall = torch.stack([20 + torch.arange(4.0), 30 + torch.arange(4.0)]).view(2, 1, 4, 1)
    seen: list[set[tuple[float, ...]]] = [set(), set(), set()]
    for number in range(60):
        one, two = ContrastiveFlowMatching().negatives([wide, tall], generator(number))
        assert one.shape == wide.shape and two.shape == tall.shape
        for row, values in enumerate([*one, *two]):
            seen[row].add(tuple(values.flatten().tolist()))
    assert seen == [
        {(20.0,) * 6, (30.0,) * 6},  # its one column, repeated; the first row
        {(10.0,) * 4, (30.0, 31.0, 32.0, 33.0)},
        {(10.0,) * 4, (20.0, 21.0, 22.0, 23.0)},
    ]
