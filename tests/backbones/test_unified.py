"""Guidance and the prompts it starts from, in numbers worked out by hand."""

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from tests.backbones.janus_parts import TEXTS, janus
from umm_zoo.backbones.unified import AttendedPadding, NullPrompt, PaddedPrompt, guided

C, U, SCALE = tensor([2.0, 0.0, -1.0]), tensor([1.0, 0.0, 0.0]), 5.0
BOS, BOI, PAD = 9, 7, 1
IDS = tensor([[PAD, PAD, BOS, 4, BOI], [BOS, 2, 3, 4, BOI]])
MASK = tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()


def test_guided_log_probabilities():
    logits = guided(C, U, SCALE)
    assert_close(logits, tensor([6.0, 0.0, -5.0]))
    assert_close(logits.log_softmax(-1), tensor([-0.002492, -6.002492, -11.002492]), atol=1e-6, rtol=0)
    assert_close(C.log_softmax(-1), tensor([-0.169846, -2.169846, -3.169846]), atol=1e-6, rtol=0)


def test_a_gradient_reaches_both_rows():
    c, u = C.clone().requires_grad_(), U.clone().requires_grad_()
    guided(c, u, SCALE).log_softmax(-1)[1].backward()
    assert_close(c.grad, tensor([-4.987554, 4.987637, -0.000083]), atol=1e-6, rtol=0)
    assert_close(u.grad, tensor([3.990043, -3.990110, 0.000067]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("score, expected", [("conditional", [0.153716, -0.111723, -0.041993]), ("guided", [0.0, 0.0, 0.0])])
def test_scoring_guided_draws_without_guidance_has_a_drift(score, expected):
    chances, mean = guided(C, U, SCALE).softmax(-1), torch.zeros(3)
    for token in range(3):
        c = C.clone().requires_grad_()
        logits = c if score == "conditional" else guided(c, U, SCALE)
        logits.log_softmax(-1)[token].backward()
        mean += chances[token] * c.grad
    assert_close(mean, tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "form, ids, mask",
    [
        (PaddedPrompt(), [[1, 1, 9, 1, 7], [9, 1, 1, 1, 7]], MASK.tolist()),
        (AttendedPadding(), [[1, 1, 9, 1, 7], [9, 1, 1, 1, 7]], [[True] * 5] * 2),
        (NullPrompt(), [[1, 1, 1, 9, 7]] * 2, [[False, False, False, True, True]] * 2),
    ],
)
def test_prompts_that_say_nothing(form, ids, mask):
    assert [part.tolist() for part in form(IDS, MASK, PAD, BOS)] == [ids, mask]


def test_without_a_first_token_nothing_but_begin_of_image_stays():
    assert PaddedPrompt()(IDS, MASK, PAD, None)[0].tolist() == [[1, 1, 1, 1, 7]] * 2
    assert NullPrompt()(IDS, MASK, PAD, None)[1].tolist() == [[False, False, False, False, True]] * 2


@pytest.fixture(scope="module")
def model():
    return janus()


IMAGE_IDS = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(3))


def test_scale_one_is_the_conditional_row_and_runs_no_other(model, monkeypatch):
    inputs = model.image_prompt(TEXTS)
    expected = model.image_logits(inputs, IMAGE_IDS).log_softmax(-1).gather(-1, IMAGE_IDS[..., None])[..., 0]
    monkeypatch.setattr(type(model), "unconditional", None)
    assert torch.equal(model.image_log_probs(inputs, IMAGE_IDS), expected)


def test_scale_zero_is_the_unconditional_row(model):
    inputs = model.image_prompt(TEXTS)
    expected = model.image_log_probs(model.unconditional(inputs), IMAGE_IDS)
    assert_close(model.image_log_probs(inputs, IMAGE_IDS, scale=0.0), expected, atol=1e-5, rtol=0)


def test_temperature_divides_guided_logits(model):
    inputs = model.image_prompt(TEXTS)
    rows = [model.image_logits(prompt, IMAGE_IDS) for prompt in (inputs, model.unconditional(inputs))]
    expected = ((rows[1] + 3.0 * (rows[0] - rows[1])) / 0.7).log_softmax(-1).gather(-1, IMAGE_IDS[..., None])[..., 0]
    assert_close(model.image_log_probs(inputs, IMAGE_IDS, scale=3.0, temperature=0.7), expected, atol=1e-5, rtol=0)


def test_with_guidance_a_gradient_reaches_the_prompt_that_says_nothing(monkeypatch):
    model, inputs = janus(), janus().image_prompt(TEXTS[:1])
    found = model.unconditional(inputs)
    found.embeddings = found.embeddings.detach().requires_grad_()
    monkeypatch.setattr(model, "unconditional", lambda _: found)
    model.image_log_probs(inputs, IMAGE_IDS[:1], scale=3.0).sum().backward()
    assert found.embeddings.grad.abs().amax(-1).gt(0).all()
