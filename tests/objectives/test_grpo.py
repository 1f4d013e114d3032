"""GRPO against closed forms: T1 to T14 are numbers worked out by hand from the objective's definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.objectives.advantages import Advantage, BatchStandardised, GroupStandardised, centred
from umm_zoo.objectives.grpo import GRPO, ConstantLength, SequenceMean, k3

LENGTHS = torch.tensor([2, 6])
MASK = torch.arange(8) < LENGTHS[:, None]  # [2, 8]


def loss_of(ratio: float, gain: float, **arguments: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient with respect to log pi of one token with a given ratio and advantage."""
    log_prob = torch.tensor([[math.log(ratio) - 1.5]], requires_grad=True)
    old = torch.full((1, 1), -1.5)
    result = GRPO(kl_weight=0.0, **arguments)(log_prob, torch.ones(1, 1, dtype=torch.bool), torch.tensor([gain]), old)
    result["loss"].backward()
    return result["loss"].detach(), log_prob.grad[0, 0]


def test_t1_at_the_policy_that_drew_the_ratio_is_one_and_nothing_is_clipped():
    log_probs = -torch.rand(4, 3).requires_grad_()
    gains = torch.tensor([1.0, -1.0, 2.0, -2.0])
    out = GRPO(kl_weight=0.0)(log_probs, torch.ones(4, 3, dtype=torch.bool), gains)
    assert_close(out["loss"].detach(), torch.tensor(0.0))
    assert out["clip_fraction"] == 0
    uneven = GRPO(kl_weight=0.0, aggregation=ConstantLength(8))(log_probs.new_zeros(2, 8), MASK, torch.tensor([1.0, -1.0]))
    assert_close(uneven["loss"], torch.tensor(-(2 - 6) / 16))


def test_t2_gradient_is_the_policy_gradient_with_a_mean_over_each_answer():
    log_probs = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    gains = torch.tensor([0.7, -1.3], dtype=torch.float64)
    GRPO(kl_weight=0.0)(log_probs, MASK, gains)["loss"].backward()
    expected = torch.zeros(2, 8, dtype=torch.float64)
    for row, length in enumerate([2, 6]):
        expected[row, :length] = -gains[row] / length / 2
    assert_close(log_probs.grad, expected, check_dtype=False, atol=1e-7, rtol=1e-6)


def test_t3_advantages_of_four_rewards():
    rewards = torch.tensor([[0.2, 0.4, 0.6, 0.8]])
    assert_close(GroupStandardised()(rewards)[0], torch.tensor([-1.161445, -0.387148, 0.387148, 1.161445]), atol=2e-6, rtol=0)
    biased = torch.tensor([-1.341041, -0.447014, 0.447014, 1.341041])
    assert_close(GroupStandardised(correction=0)(rewards)[0], biased, atol=2e-6, rtol=0)
    assert_close(centred(rewards)[0], torch.tensor([-0.3, -0.1, 0.1, 0.3]))


@pytest.mark.parametrize("advantage", [GroupStandardised(), GroupStandardised(delta=0.0), BatchStandardised()])
def test_t4_equal_rewards_have_no_advantage(advantage: Advantage):
    gains = advantage(torch.tensor([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7]]))
    assert not gains.isnan().any() and (gains == 0).all()
    log_probs = torch.randn(6, 2, requires_grad=True)
    GRPO(kl_weight=0.0)(log_probs, torch.ones(6, 2, dtype=torch.bool), gains.flatten())["loss"].backward()
    assert (log_probs.grad == 0).all()


def test_t5_shift_and_scale_of_rewards_do_not_matter():
    rewards = torch.rand(3, 5)
    gains = GroupStandardised()(rewards)
    assert_close(GroupStandardised()(rewards + 4), gains, atol=1e-4, rtol=0)
    assert_close(GroupStandardised()(rewards * 7), gains, atol=2e-3, rtol=0)
    assert_close(gains.sum(1), torch.zeros(3), atol=1e-5, rtol=0)


def test_t6_a_spread_of_a_hundredth_becomes_advantages_of_order_one():
    rewards = torch.tensor([[0.8601, 0.8655, 0.8712, 0.8590]])
    gains, undamped = GroupStandardised()(rewards)[0], GroupStandardised(delta=0.0)(rewards)[0]
    assert_close(gains, torch.tensor([-0.67470, 0.27163, 1.27054, -0.86747]), atol=5e-5, rtol=0)
    assert_close(1 - (gains / undamped).mean().item(), 0.018, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("ratio", "gain", "value"), [(0.5, 1, 0.5), (0.5, -1, -0.8), (1.1, 1, 1.1), (1.1, -1, -1.1), (1.5, 1, 1.2), (1.5, -1, -1.5)]
)
def test_t7_clip_table(ratio: float, gain: float, value: float):
    assert_close(-loss_of(ratio, gain)[0], torch.tensor(value))


@pytest.mark.parametrize(("ratio", "gain", "moves"), [(1.5, 1, False), (0.5, -1, False), (1.5, -1, True), (0.5, 1, True)])
def test_t8_no_gradient_where_the_clip_is_active(ratio: float, gain: float, moves: bool):
    gradient = loss_of(ratio, gain)[1]
    assert_close(gradient, torch.tensor(-ratio * gain if moves else 0.0))


def test_t8_clip_fraction_counts_the_active_tokens():
    logs = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log()
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert GRPO(kl_weight=0.0)(logs, mask, torch.tensor([1.0]), torch.zeros(1, 4))["clip_fraction"] == 0.5
    wider = GRPO(kl_weight=0.0, clip=0.6)(logs, mask, torch.tensor([1.0]), torch.zeros(1, 4))
    assert wider["clip_fraction"] == 0


@pytest.mark.parametrize(("gap", "value"), [(0.0, 0.0), (0.1, 0.005171), (-0.1, 0.004837), (1.0, 0.718282), (-1.0, 0.367879)])
def test_t9_k3_and_its_gradient(gap: float, value: float):
    log_prob = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    estimate = k3(log_prob, torch.tensor(-2.0 + gap, dtype=torch.float64))
    estimate.backward()
    assert_close(estimate.item(), value, atol=1e-6, rtol=0)
    assert_close(log_prob.grad.item(), 1 - math.exp(gap), atol=1e-9, rtol=0)


def test_t10_k3_is_unbiased():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    assert_close((policy * k3(policy.log(), reference.log())).sum(), torch.tensor(0.0252672), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("aggregation", "value", "weight"),
    [(SequenceMean(), 0.0, 1 / 12), (ConstantLength(8), 0.25, 1 / 16)],
)
def test_t11_aggregations(aggregation: SequenceMean, value: float, weight: float):
    out = GRPO(aggregation=aggregation, kl_weight=0.0)(torch.zeros(2, 8), MASK, torch.tensor([1.0, -1.0]))
    assert_close(out["loss"], torch.tensor(value))
    assert_close(aggregation(MASK)[1, 0], torch.tensor(weight))


def test_t11_parts_of_a_rollout_add_up_to_the_whole():
    log_probs, gains, reference = torch.randn(2, 8), torch.tensor([0.4, -1.0]), torch.randn(2, 8)
    old = log_probs + 0.3 * torch.randn(2, 8)
    for aggregation in (SequenceMean(), ConstantLength(8)):
        loss, weights = GRPO(aggregation=aggregation, kl_weight=0.1), aggregation(MASK)
        whole = loss(log_probs, MASK, gains, old, reference)
        parts = [loss(*(x[i : i + 1] for x in (log_probs, MASK, gains, old, reference, weights))) for i in range(2)]
        assert_close(parts[0]["loss"] + parts[1]["loss"], whole["loss"])


def test_t12_what_follows_the_end_changes_nothing_and_the_end_token_counts():
    log_probs, gains = torch.randn(2, 8, requires_grad=True), torch.tensor([1.0, 0.5])
    other = torch.where(MASK, log_probs.detach(), torch.full((), torch.nan))
    old, reference = torch.randn(2, 8), torch.randn(2, 8)
    loss = GRPO(kl_weight=0.5)
    assert_close(loss(other, MASK, gains, old, reference), loss(log_probs.detach(), MASK, gains, old, reference))
    loss(log_probs, MASK, gains, old, reference)["loss"].backward()
    assert ((log_probs.grad != 0) == MASK).sum() >= 15 and (log_probs.grad[~MASK] == 0).all()


def test_t13_beta_of_a_millionth():
    one = torch.ones(1, 1, dtype=torch.bool)
    out = GRPO()(torch.zeros(1, 1), one, torch.zeros(1), None, torch.ones(1, 1))
    assert_close(out["loss"].item(), 7.18282e-7, atol=1e-11, rtol=0)
    assert_close(out["kl"].item(), 0.718282, atol=1e-6, rtol=0)


@pytest.mark.parametrize("p_a", [0.1, 0.5, 0.93])
def test_t14_bandit(p_a: float):
    theta = torch.tensor([math.log(p_a), math.log(1 - p_a)], dtype=torch.float64, requires_grad=True)
    drawn = theta.log_softmax(0)[torch.tensor([0, 0, 1, 1])][:, None]
    gains = GroupStandardised(delta=0.0, correction=0)(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).flatten()
    assert_close(gains, torch.tensor([1.0, 1.0, -1.0, -1.0]))
    (-GRPO(kl_weight=0.0)(drawn, torch.ones(4, 1, dtype=torch.bool), gains)["loss"]).backward()
    assert_close(theta.grad[0].item(), 0.5, atol=1e-9, rtol=0)


def test_a_reward_that_is_no_number_has_no_advantage_and_spoils_no_mean():
    gains = GroupStandardised()(torch.tensor([[0.2, torch.nan, 0.6], [1.0, 2.0, 3.0]]))
    assert gains[0, 1] == 0
    assert_close(gains[0, [0, 2]], torch.tensor([-0.2, 0.2]) / (0.08**0.5 + 1e-4))
