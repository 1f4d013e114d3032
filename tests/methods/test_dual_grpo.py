"""Dual-GRPO: both advantages of one rollout (numbers worked out by hand), and two losses that leave each other alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_uae import stir, touched
from thinking_parts import Says, dual, prompts
from torch import Tensor
from torch.testing import assert_close
from uae_parts import Redness

from umm_zoo.backbones.thoughts import Thinks
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.methods.dual_settings import ConstantBalance, LinearBalance, ThoughtImages
from umm_zoo.methods.reasoning import Reasoner
from umm_zoo.methods.uae.rollouts import Rollouts
from umm_zoo.objectives.flow_grpo import FlowGRPO
from umm_zoo.objectives.grpo import GRPO
from umm_zoo.outputs import RollsOut
from umm_zoo.rewards import Reward

WORDS = ("the fruit of tree B", "a square")


class Table(Reward):
    """Rewards as stated, and what it was asked."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values, self.asked = values, [""]

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        self.asked = batch.user_texts()
        return torch.tensor(self.values)


@pytest.mark.parametrize(
    ("compared", "images"),
    [
        ("thought", (0.706607, -0.706607, -0.706607, 0.706607)),
        ("prompt", (1.200385, 0.240077, -1.200385, -0.240077)),
    ],
)
def test_t1_advantages_of_thoughts_and_of_images(compared: Any, images: tuple[float, ...]) -> None:
    rewards = Table(0.9, 0.7, 0.4, 0.6)
    method = dual(text_reward=rewards, image_reward=rewards, images=ThoughtImages(2, compared=compared))
    losses = method.training_losses(prompts(WORDS[0]))
    assert_close(method.rollout.rewards, torch.tensor([[0.8, 0.5]]))
    assert_close(method.rollout.advantages, torch.tensor([0.706774, -0.706774]), atol=2e-6, rtol=0)
    assert_close(method.rollout.image_advantages, torch.tensor(images), atol=2e-6, rtol=0)
    assert_close(losses["reward"], torch.tensor(0.65)) and assert_close(losses["image_reward"], torch.tensor(0.65))


def test_the_share_of_the_text_in_the_rewards_spread_is_half_for_one_image_and_four_fifths_for_four() -> None:
    random = torch.Generator().manual_seed(0)
    thoughts = torch.randn(40_000, 1, generator=random)
    for each, share in ((1, 0.5), (4, 0.8)):
        rewards = (thoughts + torch.randn(40_000, each, generator=random)).mean(1)
        assert float(1 / rewards.var()) == pytest.approx(share, abs=0.02)


def test_images_are_judged_under_the_rewrite_and_thoughts_under_the_prompt() -> None:
    text, image = Table(*range(8)), Table(*range(8))
    method = dual(text_reward=text, image_reward=image)
    told = Reasoner(temperature=1.0)
    told.thoughts = lambda batch, texts: [told.thought(w, f"Revised Prompt: {k}") for k, w in enumerate("abcd")]  # type: ignore
    method.reasoner = told
    told.max_new_tokens = 2
    method.roll_out(prompts(*WORDS))
    assert text.asked == list(WORDS) and image.asked == ["0", "1", "2", "3"]


def backward(method: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    losses = method.training_losses(prompts(*WORDS))
    losses["loss"].backward()
    return losses


@pytest.mark.parametrize(
    ("balance", "parts"),
    [
        (ConstantBalance(), {"adapter", "decoder_adapter"}),
        (ConstantBalance(image=0.0), {"adapter"}),
        (ConstantBalance(text=0.0), {"decoder_adapter"}),
    ],
)
def test_each_loss_reaches_its_own_network(balance: ConstantBalance, parts: set[str]) -> None:
    method = dual(balance=balance)
    stir(method)
    backward(method)
    assert touched(method) == parts
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)  # zeros for ranks that wait


def test_the_gradient_of_thoughts_is_that_of_each_scored_by_itself() -> None:
    method = dual(balance=ConstantBalance(text=0.7, image=0.0), objective=GRPO(kl_weight=0.05))
    stir(method)
    backward(method)
    found, rollout, total = {n: p.grad.clone() for n, p in method.adapter.named_parameters()}, method.rollout, torch.zeros(())
    method.zero_grad()
    for row, gain in enumerate(rollout.advantages):
        tokens = rollout.samples.tokens[row][rollout.samples.mask[row]][None]
        asked = method.vlm.embed([method.reasoner.questions(rollout.batch)[row // 2]], None, [0], for_generation=True)
        whole = method.vlm.with_answers(asked, tokens, torch.ones_like(tokens, dtype=torch.bool))
        own = method.vlm.log_probs(whole)[0][0, -tokens.shape[1] :]
        with torch.no_grad(), method.adapter.disabled():
            gap = method.vlm.log_probs(whole)[0][0, -tokens.shape[1] :] - own
        gap = gap + own.detach() - own
        total = total - (0.7 * gain * (own - own.detach()).exp() - 0.05 * (gap.exp() - gap - 1)).mean() / len(rollout.advantages)
    total.backward()
    for name, parameter in method.adapter.named_parameters():
        assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-3)


def test_the_gradient_of_images_is_that_of_each_step_of_each_image_by_itself() -> None:
    method = dual(balance=ConstantBalance(text=0.0, image=1.3), guidance=1.0)
    stir(method)
    backward(method)
    found, rollout = {n: p.grad.clone() for n, p in method.decoder_adapter.named_parameters()}, method.rollout
    method.zero_grad()
    total, objective = torch.zeros(()), method.image_objective
    for image, gain in enumerate(rollout.image_advantages):
        text = [method.reasoner.thought(WORDS[image // 4], rollout.captions[image // 2]).request]
        for step in objective.trained_steps:
            x, after = rollout.path.states[step, image][None], rollout.path.states[step + 1, image][None]
            one = objective.transition(method.renderer.decoder, x, step, method.condition(text)).log_prob(after)
            total = total - 1.3 * gain * (one - one.detach()).exp().sum() / (8 * len(objective.trained_steps))
    total.backward()
    for name, parameter in method.decoder_adapter.named_parameters():
        assert_close(found[name], parameter.grad, atol=1e-6, rtol=2e-3)


def test_micro_batches_change_nothing() -> None:
    found = []
    for size in (None, 3, 1):
        method = dual(rollouts=Rollouts(2, micro_batch=size))
        stir(method)
        torch.manual_seed(7)
        rollout = method.roll_out(prompts(*WORDS))
        method.window, method.steps_begun = [rollout], 1
        if found:  # the draws of a path come in other portions
            rollout.path, rollout.image_rewards, rollout.rewards = found[0][:3]
            rollout.samples = found[0][3]
        method.set_advantages([rollout])
        method._looked_ahead = True
        method.training_losses(prompts(*WORDS))["loss"].backward()
        found.append((rollout.path, rollout.image_rewards, rollout.rewards, rollout.samples, [p.grad for p in method.parameters()]))
    for other in found[1:]:
        for one, two in zip(found[0][4], other[4], strict=True):
            assert (one is None) == (two is None) and (one is None or assert_close(one, two, atol=1e-6, rtol=1e-3) is None)


def test_the_kl_of_each_side_is_against_the_network_without_its_adapter() -> None:
    kls = {"objective": GRPO(kl_weight=0.1), "image_objective": FlowGRPO(num_steps=3, clip=1e-2, kl_weight=0.1)}
    method = dual(**kls)
    losses = method.training_losses(prompts(*WORDS))
    assert losses["kl"] == losses["image_kl"] == 0
    stir(method)
    method.window, method.steps_begun = (), 0
    losses = method.training_losses(prompts(*WORDS))
    assert losses["kl"] > 0 and losses["image_kl"] > 0


def test_what_cannot_be_compared_is_refused() -> None:
    cold, one = Reasoner(max_new_tokens=5), ThoughtImages(1)
    for arguments, words in (({"reasoner": cold}, "temperature"), ({"images": one}, "2 or more")):
        with pytest.raises(ValueError, match=words):
            dual(**arguments)
    dual(images=ThoughtImages(1, compared="prompt"))
    dual(images=one, balance=ConstantBalance(image=0.0))
    for balance in (LinearBalance((1.0, 0.0), (0.0, 1.0), 2), ConstantBalance()):
        with pytest.raises(ValueError, match="2 or more"):
            dual(images=one, balance=balance)
    for part in ("connector", "language_model"):
        with pytest.raises(UserError, match=f"training.trained: found '{part}'"):
            dual([part])
    with pytest.raises(ValueError, match="without an adapter"):
        dual(adapter=None, objective=GRPO(kl_weight=0.1))


def test_losses_without_a_weight_train_nothing_and_are_refused() -> None:
    with pytest.raises(UserError, match="whose loss has no weight"):
        dual(["decoder_adapter"], balance=ConstantBalance(image=0.0))
    dual(["adapter", "decoder_adapter"], balance=ConstantBalance(image=0.0))
    dual(["decoder_adapter"], balance=LinearBalance((1.0, 0.0), (1.0, 1.0), 2))
    for ends in (((0.0, 0.0), (1.0, 1.0)), ((1.0, 0.0), (0.0, 0.0))):
        with pytest.raises(ValueError, match="one above 0 at each end"):
            LinearBalance(*ends, 2)


def test_weights_go_in_a_line_and_stay() -> None:
    balance = LinearBalance((1.0, 0.0), (0.5, 1.0), 4)
    assert [balance(step) for step in (0, 2, 4, 9)] == [(1.0, 0.0), (0.75, 0.5), (0.5, 1.0), (0.5, 1.0)]
    method = dual(balance=balance)
    method.step.number = 2
    stir(method)
    losses = backward(method)
    half = dual(balance=ConstantBalance(0.75, 0.5))
    stir(half)
    assert {"text_loss", "image_loss"} <= losses.keys()


def test_it_thinks_generates_and_rolls_out() -> None:
    method = dual()
    assert isinstance(method, Thinks) and isinstance(method, RollsOut) and method.rollout_outputs() is None
    method.training_losses(prompts(*WORDS))
    outputs, batch = method.rollout_outputs()
    assert outputs.answers == method.rollout.captions[::2] and len(outputs.generated) == 2 and batch.keys == ["row0", "row1"]
    assert torch.equal(outputs.generated[1], method.rollout.generated[4])
    method.training_losses(prompts(*WORDS, targets=False))
    assert method.rollout_outputs()[0].references is None
    method.reasoner = Says("Revised Prompt: a square")
    assert method.eval().validation_step(prompts(*WORDS), 0).scalars["marked"] == 1 and isinstance(method.text_reward, Redness)
