"""No mask goes into attention where nothing is padded, one does where anything is, and neither changes a number."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.backbones import janus_parts
from tests.backbones.vlm_parts import assistant, llava, qwen, random_images, user
from umm_zoo.backbones.text_encoder import TextEncoder
from umm_zoo.batch import Grid
from umm_zoo.blocks.details import Details
from umm_zoo.blocks.pathways import ExpertPathway, FrozenPathway
from umm_zoo.methods.uae.readers import AnswerStatesReader, TextOnlyReader

EQUAL = [[user("<image>\nWhat is it?"), assistant("red")], [user("<image>\nWhat is it?"), assistant("red")]]
UNEQUAL = [EQUAL[0], [user("<image>\nWhat is it?"), assistant("a small red circle")]]


@pytest.fixture(scope="module", params=[llava, qwen], ids=["llava", "qwen"])
def vlm(request):
    return request.param().eval()


@contextmanager
def masks_given(layers: nn.ModuleList) -> Iterator[list[Tensor | None]]:
    """The masks that the attention of the last layer is called with."""
    seen: list[Tensor | None] = []
    attention: Any = layers[len(layers) - 1].self_attn
    handle = attention.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["attention_mask"]), with_kwargs=True
    )
    yield seen
    handle.remove()


def gradients(outputs: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
    """Of a sum with unequal weights, so that no error cancels."""
    return torch.autograd.grad((outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum(), sources)


@pytest.mark.parametrize(("rows", "masked"), [(EQUAL, False), (UNEQUAL, True), (UNEQUAL[1:], False)])
def test_layers_get_a_mask_exactly_where_a_row_is_padded(vlm, rows, masked):
    images = random_images(vlm, len(rows))
    inputs = vlm.embed(rows, images, [1] * len(rows))
    assert inputs.padded == masked == (not inputs.attention_mask.all())
    with masks_given(vlm.text_model.layers) as seen:
        vlm(inputs)
        vlm.log_probs(inputs)
        vlm.prefix(inputs)
    assert [mask is not None for mask in seen] == [masked] * 3


def test_states_and_gradients_are_those_under_the_causal_mask(vlm):
    vlm = copy.deepcopy(vlm).double()
    inputs = vlm.embed(EQUAL, random_images(vlm, 2).double(), [1, 1])
    embeddings = inputs.embeddings.detach().requires_grad_()
    causal = torch.ones(embeddings.shape[1], embeddings.shape[1], dtype=torch.bool).tril().expand(2, 1, -1, -1)
    weight = vlm.text_model.layers[0].self_attn.k_proj.weight
    bare, masked = (vlm.run(embeddings, mask, inputs.position_ids) for mask in (inputs.mask, causal))
    assert inputs.mask is None
    assert_close(bare, masked)
    for own, other in zip(gradients(bare, embeddings, weight), gradients(masked, embeddings, weight), strict=True):
        assert_close(own, other)


def test_without_padding_the_language_model_asks_nothing_of_the_device(vlm, monkeypatch):
    inputs = vlm.embed(EQUAL, random_images(vlm, 2), [1, 1])

    def asked(*_: object) -> None:
        raise AssertionError("a value was read by the host")

    for name in ("__bool__", "__int__", "__float__", "item", "tolist"):
        monkeypatch.setattr(Tensor, name, asked)
    with torch.no_grad():
        vlm.run(inputs.embeddings, inputs.mask, inputs.position_ids)


def test_answers_are_sampled_without_a_mask_behind_prompts_of_one_length(vlm):
    prompts = [turns[:-1] for turns in EQUAL]
    shorter = [prompts[0], [user("<image>\nWhy is the circle red?")]]
    images = random_images(vlm, 2)
    with masks_given(vlm.text_model.layers) as seen:
        together = vlm.generate(prompts, images, [1, 1], 3)
        unequal = len(seen)
        vlm.generate(shorter, images, [1, 1], 3)
    assert all(mask is None for mask in seen[:unequal]) and seen[unequal] is not None
    assert together == [vlm.generate(prompts[:1], images[row : row + 1], [1], 3)[0] for row in (0, 1)]


def test_checkpointed_layers_get_none_either(caplog):
    vlm = llava(gradient_checkpointing=True).train()
    inputs = vlm.embed(EQUAL, random_images(vlm, 2), [1, 1])
    with masks_given(vlm.text_model.layers) as seen:
        vlm(inputs).loss.backward()
    assert seen == [None, None] and not caplog.records  # again in the backward pass


def queries_through(kind: type, padded: bool, with_details: bool = False, **options: Any) -> tuple[Tensor, Tensor, bool]:
    """States of queries behind prompts of one length, their gradient, and whether a mask was built."""
    pathway = kind(**options)
    vlm = qwen()
    pathway.attach(vlm.eval())
    prefix = vlm.prefix(vlm.embed([turns[:-1] for turns in EQUAL], random_images(vlm, 2), [1, 1], for_generation=True))
    assert not prefix.padded
    prefix.padded = padded
    queries = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    details = Details(queries.detach()[:, :2], torch.ones(3, 2, 2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long))
    with masks_given(pathway.stack.layers) as seen:
        states = pathway(prefix, details if with_details else None, queries, Grid(2, 3))
    return states, gradients(states, queries)[0], seen[0] is not None


@pytest.mark.parametrize("kind", [ExpertPathway, FrozenPathway])
def test_queries_that_see_all_go_without_a_mask_and_come_out_alike(kind):
    states, slopes, built = queries_through(kind, padded=False, bidirectional=True)
    others, others_slopes, others_built = queries_through(kind, padded=True, bidirectional=True)
    assert (built, others_built) == (False, True)
    assert_close(states, others, atol=1e-6, rtol=1e-5)
    assert_close(slopes, others_slopes, atol=1e-5, rtol=1e-5)


def test_queries_in_order_or_behind_details_keep_their_mask():
    assert queries_through(ExpertPathway, padded=False, bidirectional=False)[2]
    assert queries_through(ExpertPathway, padded=False, with_details=True)[2]


@pytest.mark.parametrize("reader", [TextOnlyReader(), AnswerStatesReader()])
def test_captions_of_one_length_give_the_decoder_no_mask(reader):
    vlm = qwen().eval()
    assert reader(vlm, ["red", "red"], None).mask is None
    states = reader(vlm, ["red", "a small red circle"], None)
    assert states.mask is not None and states.mask.sum(dim=1).tolist() != [states.mask.shape[1]] * 2
    assert_close(states.values[0][states.mask[0]], reader(vlm, ["red"], None).values[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_texts_of_one_length_give_the_decoder_no_mask_and_the_same_states():
    encoder = TextEncoder.from_config({"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 2}).eval()
    equal, unequal = encoder(["red", "red"]), encoder(["red", "a small red circle"])
    assert equal.mask is None and unequal.mask is not None
    assert_close(equal.values[0], unequal.values[0][unequal.mask[0]], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_image_tokens_behind_prompts_of_one_length_are_predicted_without_a_mask():
    own = janus_parts.janus()
    ids = torch.arange(2 * own.generated_grid.num_cells).view(2, -1) % 20
    equal, unequal = own.image_prompt(["red", "red"]), own.image_prompt(["red", "a small red circle"])
    with masks_given(own.text_model.layers) as seen:
        logits, others = own.image_logits(equal, ids), own.image_logits(unequal, ids)
    assert [mask is not None for mask in seen] == [False, True]
    assert_close(logits[0], others[0], atol=1e-5, rtol=1e-5)
