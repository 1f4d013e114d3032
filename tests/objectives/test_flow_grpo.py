"""Flow-GRPO against closed forms: D1 to D13, worked out from the process and the Gaussian density."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.batch import Tokens
from umm_zoo.objectives.accumulation import accumulated
from umm_zoo.objectives.advantages import BatchStandardised
from umm_zoo.objectives.flow_grpo import FlowGRPO, Transition, stochastic_step
from umm_zoo.objectives.guidance import DetachedGuidance
from umm_zoo.objectives.schedules import EvenlySpaced, LibrarySchedule

TIMES = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]
STDS = [0.70000, 0.74296, 0.53615, 0.44590, 0.39179, 0.35280, 0.31907, 0.28201, 0.22536, 0.00628]
DIFFUSIONS = [3.50567, 3.43507, 2.27263, 1.71850, 1.35920, 1.08809, 0.86117, 0.65244, 0.43441, 0.06644]
NOTHING = Tokens(torch.zeros(3, 1, 1))


def sd3_times(steps: int) -> list[float]:
    return LibrarySchedule()(steps, 4, 3).times


class Field(torch.nn.Module):
    """A velocity that depends on the state, the time and the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.3))
        self.shift = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        return self.scale * x + (self.shift * time + condition.values[:, 0, 0])[:, None, None, None]


def noise(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, 4, 3, generator=torch.Generator().manual_seed(seed))


def test_d1_without_noise_it_is_the_euler_step_and_has_no_density():
    x, v = noise(), noise(seed=1)
    step = stochastic_step(x, v, [1.0, 0.6, 0.2, 0.0], 1, 0.0)
    assert_close(step.mean, x + v * (0.2 - 0.6))
    with pytest.raises(ValueError, match="expected one that has a density"):
        step.log_prob(x)
    with pytest.raises(ValueError, match="noise_level"):
        FlowGRPO(noise_level=0.0)


@pytest.mark.parametrize(("level", "second"), [(0.7, 0.96), (0.3, 0.8), (1.1, 0.5)])
def test_d2_deviation_of_the_first_step_is_the_noise_level(level: float, second: float):
    assert_close(stochastic_step(noise(), noise(), [1.0, second, 0.0], 0, level).std, level)


def test_d3_score_of_a_gaussian():
    m, s0, t, x = 0.3, 0.5, 0.6, 0.9
    variance = ((1 - t) * s0) ** 2 + t**2
    direct = -(x - (1 - t) * m) / variance
    # v = E[noise - x_0 | x], from the regression of both on x
    gap = (x - (1 - t) * m) / variance
    velocity = t * gap - (m + (1 - t) * s0**2 * gap)
    assert_close(direct, -1.95)
    assert_close(-x / t - (1 - t) / t * velocity, direct)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7])
def test_d4_the_process_keeps_the_marginal(level: float):
    m, s0, count = 0.3, 0.5, 200_000
    times = torch.linspace(0.999, 0, 401, dtype=torch.float64).tolist()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 1, 1, 1, generator=generator)
    for step, t in enumerate(times[:-1]):
        variance = ((1 - t) * s0) ** 2 + t**2
        gap = (x - (1 - t) * m) / variance
        transition = stochastic_step(x, t * gap - (m + (1 - t) * s0**2 * gap), times, step, level)
        x = transition.mean + transition.std * torch.randn(x.shape, generator=generator)
    assert abs(x.mean().item() - m) < 0.003  # half the draws of the specification, so a little wider
    assert abs(x.std().item() - s0) < 0.005


def test_d5_a_stored_trajectory_scored_again_has_ratio_one():
    field, objective = Field(), FlowGRPO(num_steps=4)
    path = objective.rollout(field, noise(), NOTHING, torch.Generator().manual_seed(1))
    assert path.states.shape == (5, 3, 2, 4, 3) and path.log_probs.shape == (4, 3)
    for step in objective.trained_steps:
        out = objective.step_loss(field, path, step, NOTHING, torch.tensor([1.0, -2.0, 1.0]))
        assert_close(out["loss"].item(), 0.0, atol=1e-6, rtol=0)
        assert out["ratio_spread"] < 1e-6 and out["clip_fraction"] == 0


def test_d6_gradient_with_respect_to_the_velocity():
    x, following, gain, level, step = noise(), noise(seed=2), torch.tensor([1.5, -0.5, 1.0]), 0.7, 2
    times = sd3_times(6)
    velocity = noise(seed=3).requires_grad_()
    transition = stochastic_step(x, velocity, times, step, level)
    old = transition.log_prob(following).detach()
    (-gain * (transition.log_prob(following) - old).exp()).sum().backward()
    t, dt = times[step], times[step + 1] - times[step]
    g = level * math.sqrt(t / (1 - t))
    slope = (1 + g**2 * (1 - t) / (2 * t)) * dt
    expected = -gain[:, None, None, None] * (following - transition.mean.detach()) / (g**2 * -dt) * slope / 24
    assert_close(velocity.grad, expected, atol=1e-6, rtol=1e-5)


def test_d7_divergence_is_the_kl_times_the_step_over_the_dimension():
    x, mine, other, times, step, level = noise(), noise(seed=4), noise(seed=5), sd3_times(6), 3, 0.7
    first, second = (stochastic_step(x, v, times, step, level) for v in (mine, other))
    t, dt = times[step], times[step + 1] - times[step]
    g = first.diffusion
    closed = -dt / 2 * (g * (1 - t) / (2 * t) + 1 / g) ** 2 * (mine - other).square().flatten(1).sum(1)
    assert_close((first.mean - second.mean).square().flatten(1).sum(1) / (2 * first.std**2), closed)  # the KL of two Gaussians
    assert_close(first.divergence(second.mean), -dt / 24 * closed)
    assert_close(second.divergence(first.mean), -dt / 24 * closed)
    assert (first.divergence(first.mean) == 0).all()


@pytest.mark.parametrize("size", [1, 7])
def test_d8_log_density_at_the_mean(size: int):
    mean = torch.randn(2, 3, size, size)
    assert_close(Transition(mean, 0.4, 1.0, -0.1).log_prob(mean), torch.full((2,), -math.log(0.4) - 0.5 * math.log(2 * math.pi)))


def test_d9_mean_and_not_sum_over_elements():
    mean, x = noise(), noise(seed=6)
    once = Transition(mean, 0.4, 1.0, -0.1).log_prob(x)
    thrice = Transition(mean.repeat(1, 3, 1, 1), 0.4, 1.0, -0.1).log_prob(x.repeat(1, 3, 1, 1))
    assert_close(thrice, once)
    density = torch.distributions.Normal(mean, 0.4).log_prob(x).flatten(1)
    assert_close(once, density.sum(1) / 24)


def test_d10_guidance_gives_the_unconditional_branch_no_gradient():
    x, time = noise(), torch.full((3,), 0.4)
    positive = torch.ones(3, 1, 1, requires_grad=True)
    negative = torch.full((3, 1, 1), -2.0, requires_grad=True)
    for scale in (0.5, 4.5):
        field = Field()
        guided = DetachedGuidance(field, Tokens(negative), scale)(x, time, Tokens(positive))
        con, unc = field(x, time, Tokens(positive)), field(x, time, Tokens(negative))
        assert_close(guided, unc + scale * (con - unc))
        gradient = torch.autograd.grad(guided.sum(), [positive, negative, field.scale], allow_unused=True)
        assert gradient[1] is None
        assert_close(gradient[0].sum(), torch.tensor(scale * x.numel()))
        assert_close(gradient[2], scale * x.sum(), atol=1e-4, rtol=1e-4)
    plain = DetachedGuidance(field, Tokens(negative), 1.0)(x, time, Tokens(positive))
    assert torch.equal(plain, con)
    with pytest.raises(ValueError, match="negative"):
        DetachedGuidance(field, None, 2.0)


def test_d11_schedule():
    assert_close(sd3_times(10), [float(t) for t in TIMES], atol=1e-6, rtol=0)
    steps = [stochastic_step(noise(), noise(), sd3_times(10), k, 0.7) for k in range(10)]
    assert_close([step.std for step in steps], STDS, atol=1e-5, rtol=0)
    assert_close([step.diffusion for step in steps], DIFFUSIONS, atol=1e-5, rtol=1e-5)
    assert steps[-1].std < 0.01
    assert list(FlowGRPO().trained_steps) == list(range(9))


def test_the_schedule_is_that_of_evaluation_unless_another_is_stated():
    own, other = FlowGRPO(num_steps=4), FlowGRPO(num_steps=4, schedule=EvenlySpaced(2.0))
    assert_close(own.times(noise()).times, sd3_times(4))
    for objective in (own, other):
        objective.match(EvenlySpaced(1.0))
    assert own.times(noise()).times == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert_close(other.times(noise()).times, [1.0, 6 / 7, 2 / 3, 0.4, 0.0])


def test_a_first_time_just_below_one_has_the_spread_of_one():
    """Sana's schedule starts at .99967, where sqrt(t / (1 - t)) is 55."""
    for first in (1.0, 0.99967):
        assert_close(stochastic_step(noise(), noise(), [first, 0.9, 0.0], 0, 0.7).diffusion, 0.7 * (first / 0.1) ** 0.5)


def test_d12_a_group_of_equal_rewards_has_no_advantage_though_the_batch_spreads():
    gains = BatchStandardised()(torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.5, 0.9]]))
    assert (gains[0] == 0).all()
    spread = torch.tensor([0.3, 0.3, 0.3, 0.1, 0.5, 0.9]).std(correction=0)
    assert_close(gains[1], torch.tensor([-0.4, 0.0, 0.4]) / (spread + 1e-4))
    far = BatchStandardised()(torch.tensor([[0.0] * 63 + [100.0]]))
    assert far[0, -1] == 5


def test_d13_a_good_step_pulls_the_mean_towards_it():
    field, objective = Field(), FlowGRPO(num_steps=4, clip=0.5)
    start = torch.zeros(1, 1, 1, 1)
    condition = Tokens(torch.zeros(1, 1, 1))
    path = objective.rollout(field, start, condition, torch.Generator().manual_seed(0))
    before = objective.transition(field, start, 0, condition).mean
    path.states[1] = before.detach() + 0.5
    path.log_probs[0] = objective.transition(field, start, 0, condition).log_prob(path.states[1]).detach()
    objective.step_loss(field, path, 0, condition, torch.tensor([2.0]))["loss"].backward()
    torch.optim.SGD(field.parameters(), 0.05).step()
    assert objective.transition(field, start, 0, condition).mean > before


def test_kl_to_a_reference_is_added_with_its_weight():
    field, other = Field(), Field()
    with torch.no_grad():
        other.shift += 0.5
    objective = FlowGRPO(num_steps=4, kl_weight=0.3)
    path = objective.rollout(field, noise(), NOTHING)
    out = objective.step_loss(field, path, 1, NOTHING, torch.zeros(3), other)
    assert out["kl"] > 0
    assert_close(out["loss"].detach(), 0.3 * out["kl"])


@pytest.mark.parametrize("low_precision", [False, True])
def test_gradients_taken_part_by_part_are_those_of_the_sum(low_precision: bool):
    torch.manual_seed(0)
    layer, unused = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.ones(2))
    parameters = [*layer.parameters(), unused]
    inputs = [torch.randn(5, 4) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        with torch.no_grad():
            layer(inputs[0])  # leaves weights in autocast's cache that have no graph
        loss = accumulated([lambda x=x: layer(x).square().mean() for x in inputs], parameters)
    loss.backward()
    found = [p.grad.clone() for p in parameters]
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        whole = sum(layer(x).square().mean() for x in inputs)
    whole.backward()
    assert_close(loss.detach().float(), whole.detach().float(), atol=1e-2 if low_precision else 1e-5, rtol=1e-2)
    assert_close(found[0], layer.weight.grad, atol=1e-2 if low_precision else 1e-6, rtol=1e-2)
    assert found[0].any() and (found[2] == 0).all()
