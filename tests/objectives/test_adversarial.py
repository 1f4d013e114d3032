"""A generator and its discriminator in one backward pass, against two; values by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from umm_zoo.errors import UserError
from umm_zoo.objectives.adversarial import AdversarialLoss, balance, last_matrix


class Judge(nn.Module):
    """Dropout, batch norm and spectral norm: whatever could make a copy another."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 5, 3))
        self.layers = nn.Sequential(first, nn.BatchNorm2d(5), nn.LeakyReLU(0.2), nn.Dropout(0.4), nn.Conv2d(5, 1, 2))

    def forward(self, images: Tensor, context: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        return self.layers(images if context is None else images + context)


class Constant(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, images: Tensor, context: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        return self.value.expand(len(images), 1, 2, 3) + 0 * images.mean()


class Linear(Constant):
    """D(x) = sum of w x over an image, at each of two patches half of it."""

    def forward(self, images: Tensor, context: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        weights = torch.arange(1.0, images[0].numel() + 1).view(images.shape[1:])
        return 0.5 * (self.value * weights * images).flatten(1).sum(1)[:, None].expand(-1, 2)


def parts() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 1))
    return generator, Judge(), torch.rand(3, 3, 6, 5) * 2 - 1


def gradients(*modules: nn.Module) -> list[Any]:
    return [parameter.grad for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("kind", ["hinge", "non_saturating", "vanilla"])
def test_one_backward_pass_is_two_bit_for_bit(kind: Any) -> None:
    generator, judge, images = parts()
    loss, context = AdversarialLoss(kind, weight=0.5, r1=2.0, r1_every=3), torch.rand(3, 1, 1, 1)
    apart = copy.deepcopy(generator), copy.deepcopy(judge)
    made = generator(images)
    state = torch.get_rng_state()
    terms = loss.terms(judge, images, made, 2, context)
    after = torch.get_rng_state()
    loss.total(terms, (made - images).square().mean(), generator, 2)["loss"].backward()

    rest = copy.deepcopy(apart[1])
    made = apart[0](images)
    torch.set_rng_state(state)
    judged = loss.generator_loss(rest(made, context)).mean()
    ((made - images).square().mean() + 0.5 * judged).backward()
    torch.set_rng_state(state)
    of_fake, seen = apart[1](made.detach(), context), images.clone().requires_grad_()
    of_real = apart[1](seen, context)
    (slope,) = torch.autograd.grad(of_real.sum(), seen, create_graph=True)
    penalty = slope.square().sum(dim=(1, 2, 3)).mean()
    (loss.discriminator_loss(of_real, of_fake).mean() + 2.0 / 2 * 3 * penalty).backward()

    assert torch.equal(torch.get_rng_state(), after)
    for one, other in zip(gradients(generator, judge), gradients(*apart), strict=True):
        assert torch.equal(one, other)
    assert sum(bool(gradient.any()) for gradient in gradients(generator, judge)) >= 9  # a hinge may leave a last bias in balance
    for name, value in judge.state_dict().items():
        assert torch.equal(value, apart[1].state_dict()[name]), name


def test_neither_reaches_the_other() -> None:
    generator, judge, images = parts()
    terms = AdversarialLoss().terms(judge, images, generator(images), 0)
    terms["generator"].backward(retain_graph=True)
    assert all(gradient is None for gradient in gradients(judge))
    generator.zero_grad()
    terms["discriminator"].backward()
    assert all(gradient is None for gradient in gradients(generator)) and all(gradient is not None for gradient in gradients(judge))


@pytest.mark.parametrize(
    ("kind", "generator", "discriminator"),
    [("hinge", 0.0, 1.0), ("non_saturating", math.log(2), 2 * math.log(2)), ("vanilla", math.log(2), math.log(2))],
)
def test_losses_of_a_judge_that_says_nothing(kind: Any, generator: float, discriminator: float) -> None:
    images = torch.randn(2, 3, 4, 4)
    terms = AdversarialLoss(kind, r1=10.0, r1_every=1).terms(Constant(), images, images + 1, 0)
    found = {name: value.item() for name, value in terms.items()}
    assert found == pytest.approx({"generator": generator, "discriminator": discriminator, "r1": 0.0}, abs=1e-6)


def test_losses_of_a_judge_that_is_sure() -> None:
    real, fake = torch.tensor([[2.0], [0.5]]), torch.tensor([[-3.0], [0.25]])
    hinge, vanilla, paper = (AdversarialLoss(kind) for kind in ("hinge", "vanilla", "non_saturating"))  # type: ignore[arg-type]
    assert_close(hinge.discriminator_loss(real, fake), torch.tensor([0.0, (0.5 + 1.25) / 2]))
    assert_close(hinge.generator_loss(fake), torch.tensor([3.0, -0.25]))
    sigmoid = [[1 / (1 + math.exp(-float(value))) for value in values] for values in (real, fake)]
    expected = torch.tensor([-math.log(sigmoid[0][i]) - math.log(1 - sigmoid[1][i]) for i in range(2)])
    assert_close(paper.discriminator_loss(real, fake), expected)
    assert_close(vanilla.discriminator_loss(real, fake), expected / 2)
    for loss in (paper, vanilla):
        assert_close(loss.generator_loss(fake), torch.tensor([-math.log(value) for value in sigmoid[1]]))


def test_r1_is_taken_now_and_then_with_as_many_times_its_weight() -> None:
    images, judge = torch.randn(2, 3, 1, 2), Linear(2.0)
    loss = AdversarialLoss(r1=10.0, r1_every=4)
    squares = sum(n**2 for n in range(1, 7))
    found = [loss.terms(judge, images, images, step)["r1"] for step in range(9)]
    assert_close(torch.stack(found), torch.tensor([4.0 * squares / 2 if step in (3, 7) else 0.0 for step in range(9)]))
    total = loss.total(
        {"generator": torch.zeros(()), "discriminator": torch.zeros(()), "r1": found[3]}, torch.zeros(()), found[3], 3
    )
    total["loss"].backward()
    assert_close(judge.value.grad, torch.tensor(10.0 / 2 * 4 * 2 * 2.0 * squares))


def test_the_weight_of_the_generator_s_term_is_the_ratio_of_gradients_within_bounds() -> None:
    layer = nn.Linear(2, 1, bias=False)
    near, far = 3.0 * layer.weight[0, 0], -4.0 * layer.weight[0, 1]  # gradients of norm 3 and 4
    assert_close(balance(near, far, layer.weight), torch.tensor(3 / (4 + 1e-4)))
    for bounds, expected in (((0.0, 1e4), 3 / (4 + 1e-4)), ((0.8, 10.0), 0.8), ((0.0, 0.5), 0.5)):
        loss = AdversarialLoss(weight=0.75, adaptive=bounds)
        found = loss.total({"generator": far, "discriminator": near.detach(), "r1": near * 0}, near, layer, 0)
        assert_close(found["adversarial_weight"], torch.tensor(0.75 * expected))
        layer.zero_grad()
        found["loss"].backward(retain_graph=True)
        assert_close(layer.weight.grad, torch.tensor([[3.0, -4.0 * 0.75 * expected]]))  # the weight itself has no gradient


def test_the_discriminator_begins_before_the_generator_and_has_a_gradient_all_along() -> None:
    generator, judge, images = parts()
    loss, found = AdversarialLoss(start=5, lead=2, adaptive=(0.0, 1e4)), []
    for step in range(6):
        judge.zero_grad()
        made = generator(images)
        terms = loss.terms(judge, images, made, step)
        assert bool(terms["generator"] != 0) == (step >= 5)
        total = loss.total(terms, (made - images).square().mean(), generator, step)
        total["loss"].backward()
        assert all(gradient is not None for gradient in gradients(judge))
        found.append((any(gradient.any() for gradient in gradients(judge)), bool(total["adversarial_weight"] > 0)))
    assert found == [(False, False)] * 3 + [(True, False)] * 2 + [(True, True)]


def test_a_judge_that_is_not_asked_yet_stays_as_it_is_but_says_at_once_what_it_cannot_judge() -> None:
    _, judge, images = parts()
    before, state = copy.deepcopy(judge.state_dict()), torch.get_rng_state()
    AdversarialLoss(start=1).terms(judge, images, images, 0)
    assert all(torch.equal(value, before[name]) for name, value in judge.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="channels"):
        AdversarialLoss(start=1000).terms(judge, images[:, :2], images[:, :2], 0)


def test_the_last_layer_of_a_decoder_is_trained() -> None:
    generator, _, _ = parts()
    assert last_matrix(generator) is generator[2].weight
    with pytest.raises(UserError, match="a Sequential whose last layer is not trained, expected null"):
        last_matrix(generator.requires_grad_(False))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"start": 3, "lead": 4}, "found 4, expected at most start"), ({"adaptive": (2.0, 1.0)}, "smaller bound")],
)
def test_settings_that_cannot_be_are_refused(settings: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdversarialLoss(**settings)
