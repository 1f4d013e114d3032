"""Packed rows: what they give is what padded ones do, and nothing passes from one to another."""

import pytest
import torch
from library_checkpoints import wrapped
from torch.testing import assert_close

from tests.backbones.vlm_parts import LLAVA, QWEN, qwen
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.errors import UserError


def talk(question, answer):
    return [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]


ROWS = [
    talk("<image>\nDescribe.", "a red circle"),
    talk("Say yes.", "yes"),
    talk("<image><image> Which of them is it?", "the second"),
]
KINDS = {
    "qwen2_5_vl": (qwen, (24, 40)),
    "recomputed": (lambda: Qwen25VL.from_config(QWEN, gradient_checkpointing=True), (24, 40)),
    "llava": (lambda: LlavaBackbone.from_config(LLAVA), (12, 12)),
    "qwen3_vl": (lambda: wrapped("qwen3_vl"), (24, 32)),
}


def step(vlm, rows, images, counts):
    vlm.zero_grad()
    inputs = vlm.embed(rows, images, counts)
    output = vlm(inputs)
    states = output.hidden[inputs.attention_mask]
    (output.loss + states.square().mean()).backward()
    return inputs, output, states, {name: own.grad for name, own in vlm.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_states_losses_and_gradients_are_those_of_padded_rows(kind):
    make, size = KINDS[kind]
    vlm = make().train()
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    _, padded, states, gradients = step(vlm, ROWS, images, [1, 0, 2])
    vlm.pack_rows()
    inputs, packed, its_states, its_gradients = step(vlm, ROWS, images, [1, 0, 2])
    assert inputs.packed.segments.lengths == tuple(inputs.attention_mask.sum(1).tolist())
    assert_close((packed.loss, packed.nll, its_states), (padded.loss, padded.nll, states), rtol=0, atol=1e-5)
    assert its_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(its_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_row_does_not_feel_another():
    vlm = qwen()
    vlm.pack_rows()
    inputs = vlm.embed([ROWS[1], talk("Count to three, slowly.", "one two")], None, [0, 0])
    inputs.embeddings = inputs.embeddings.detach().requires_grad_()
    vlm(inputs).hidden[1].sum().backward()
    assert inputs.packed is not None and not inputs.embeddings.grad[0].any() and inputs.embeddings.grad[1].any()


def test_rows_of_one_length_are_left_as_they_are():
    vlm = qwen()
    vlm.pack_rows()
    assert vlm.embed([ROWS[1]] * 2, None, [0, 0]).packed is None


@pytest.mark.parametrize(
    ("kind", "words"), [("eager", "attention 'eager'"), ("gemma3", "in other ways than to all"), ("window", "in other ways")]
)
def test_what_cannot_keep_rows_apart_is_refused(kind, words):
    text = {**LLAVA["text_config"], "model_type": "mistral", "sliding_window": 4}
    made = {
        "eager": lambda: Qwen25VL.from_config(QWEN, attention="eager"),
        "gemma3": lambda: wrapped("gemma3"),
        "window": lambda: LlavaBackbone.from_config({**LLAVA, "text_config": text}),
    }
    with pytest.raises(UserError, match=words):
        made[kind]().pack_rows()
