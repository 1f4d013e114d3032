"""Qwen2.5-VL's wrapper against the library's own model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.backbones.vlm_parts import QWEN, qwen
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.templates import IGNORE

QUESTION = [{"role": "user", "text": "<image>\nWhat colour is the circle?"}]
CAPTION = [{"role": "user", "text": "<image>\nDescribe the image."}, {"role": "assistant", "text": "top left: a red circle"}]
PLAIN = [{"role": "user", "text": "Say yes."}, {"role": "assistant", "text": "yes"}]
EDIT = [
    {"role": "user", "text": "From <image> to <image>: what changed?"},
    {"role": "assistant", "text": "the circle is green"},
]


@pytest.fixture(scope="module")
def vlm():
    return qwen().eval()


def random_images(count, size=(32, 32)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(count)) * 2 - 1


def mixed_inputs(vlm):
    return vlm.embed([CAPTION, PLAIN, EDIT], random_images(3), [1, 0, 2])


def library_forward(vlm, inputs, images):
    """The library with pixels and token ids, finding embeddings and positions itself."""
    height, width = (side // vlm.layout.patch_size for side in vlm.layout.resized(*images.shape[-2:]))
    return vlm.model(
        input_ids=inputs.token_ids,
        attention_mask=inputs.attention_mask.long(),
        pixel_values=vlm.layout.patches(images),
        image_grid_thw=torch.tensor([[1, height, width]] * len(images)),
        mm_token_type_ids=inputs.image_mask.int(),
        output_hidden_states=True,
    )


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_forward_is_the_librarys_forward(vlm, size):
    images = random_images(3, size)
    inputs = vlm.embed([CAPTION, PLAIN, EDIT], images, [1, 0, 2])
    output, expected = vlm(inputs), library_forward(vlm, inputs, images)
    real = inputs.attention_mask
    assert_close(output.hidden[real], expected.hidden_states[-1][real], rtol=0, atol=1e-5)
    loss = F.cross_entropy(expected.logits[:, :-1].flatten(0, 1), inputs.labels[:, 1:].flatten(), ignore_index=IGNORE)
    assert_close(output.loss, loss, rtol=0, atol=1e-5)
    assert_close(output.nll.sum() / output.num_tokens.sum(), output.loss)


def test_positions_of_two_images_by_hand(vlm):
    inputs = vlm.embed([[{"role": "user", "text": "<image><image>"}]], random_images(2, (16, 24)), [2])
    places = inputs.image_mask[0].nonzero()[:, 0]
    first, second = places[:6], places[6:]  # 2 x 3 tokens each, with vision_end and vision_start between
    start = int(first[0])
    offsets = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]])
    assert_close(inputs.position_ids[:, 0, first], start + offsets)
    assert_close(inputs.position_ids[:, 0, second], start + 3 + 2 + offsets)


def test_windows_hold_back_what_full_attention_lets_through(vlm):
    images = random_images(1)
    changed = images.clone()
    changed[..., 16:] = 0  # the right half; windows are 16 pixels wide

    def left_changes(model):
        difference = (model.encode_images(images)[0] - model.encode_images(changed)[0]).view(4, 4, -1)
        return bool((difference[:, :2] != 0).any())

    windowed = copy.deepcopy(vlm)
    windowed.model.model.visual.fullatt_block_indexes = []
    assert left_changes(vlm) and not left_changes(windowed)


def test_greedy_answer_is_the_librarys(vlm):
    images = random_images(2)
    inputs = vlm.embed([QUESTION, QUESTION], images, [1, 1], for_generation=True)
    expected = vlm.model.generate(
        input_ids=inputs.token_ids,
        attention_mask=inputs.attention_mask.long(),
        pixel_values=vlm.layout.patches(images),
        image_grid_thw=torch.tensor([[1, 8, 8]] * 2),
        mm_token_type_ids=inputs.image_mask.int(),
        max_new_tokens=7,
        do_sample=False,
        eos_token_id=[vlm.tokenizer.eos_token_id, vlm.pad_id],
        pad_token_id=vlm.pad_id,
    )
    own = vlm.sample_from(inputs, 1, max_new_tokens=7, temperature=0.0)
    assert own.tokens.tolist() == expected[:, inputs.token_ids.shape[1] :].tolist()


@pytest.mark.parametrize("for_generation", [False, True])
def test_prefix_and_continuation_are_one_pass(vlm, for_generation):
    inputs = vlm.embed([QUESTION, PLAIN[:1]], random_images(1), [1, 0], for_generation)
    prefix = vlm.prefix(inputs)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    causal = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    states = vlm.language_stack(copied=False)(vlm.text_model.embed_tokens(tokens), prefix, prefix.text_positions(3), causal)
    for row, single in enumerate([([QUESTION], random_images(1), [1]), ([PLAIN[:1]], None, [0])]):
        alone = vlm.embed(*single, for_generation=for_generation)
        whole = vlm(vlm.with_answers(alone, tokens[row : row + 1], torch.ones(1, 3, dtype=torch.bool))).hidden[0]
        assert_close(states[row], whole[-3:], rtol=0, atol=1e-5)
        assert_close(prefix.last_hidden[row], whole[-4], rtol=0, atol=1e-5)


def test_grid_positions_are_those_of_one_more_image(vlm):
    opening = [{"role": "user", "text": "Draw:<image>"}]
    inputs = vlm.embed([opening], random_images(1, (16, 24)), [1])
    first = int(inputs.image_mask[0].nonzero()[0])
    cut = copy.copy(inputs)
    for name in ("token_ids", "embeddings", "attention_mask", "labels", "image_mask"):
        setattr(cut, name, getattr(inputs, name)[:, :first])
    cut.position_ids = inputs.position_ids[..., :first]
    grid = vlm.prefix(cut).grid_positions(vlm.image_grid(16, 24))
    assert_close(grid, inputs.position_ids[..., first : first + 6])


@pytest.mark.parametrize("tied", [True, False])
def test_parts_hold_each_parameter_once(tied):
    vlm = Qwen25VL.from_config({**QWEN, "tie_word_embeddings": tied})
    held = [id(parameter) for part in vlm.parts().values() for parameter in part.parameters()]
    assert len(held) == len(set(held)) and set(held) == {id(parameter) for parameter in vlm.parameters()}
    assert (vlm.lm_head.weight is vlm.text_model.embed_tokens.weight) == tied


def test_frozen_parts_stay_asleep_and_without_gradient():
    vlm = Qwen25VL.from_config(QWEN)
    freeze(vlm.parts()["vision_tower"])
    vlm.train()
    assert vlm.model.model.language_model.training and not any(block.training for block in vlm.model.model.visual.blocks)
    vlm(mixed_inputs(vlm)).loss.backward()
    assert all(parameter.grad is None for parameter in vlm.parts()["vision_tower"].parameters())
    for name in ("projector", "language_model"):
        assert all(parameter.grad.abs().sum() > 0 for parameter in vlm.parts()[name].parameters()), name


def test_gradient_checkpointing_changes_neither_gradient_nor_answer(vlm):
    other = Qwen25VL.from_config(QWEN, gradient_checkpointing=True)
    other.load_state_dict(vlm.state_dict())
    other.train()
    parameters = [model.model.model.visual.blocks[0].attn.qkv.weight for model in (vlm, other)]
    first, second = (
        torch.autograd.grad(model(mixed_inputs(model)).loss, parameter)[0]
        for model, parameter in zip((vlm, other), parameters, strict=True)
    )
    assert other.model.model.visual.blocks[0].gradient_checkpointing
    assert_close(second, first, rtol=0, atol=1e-6)
    asked = ([QUESTION], random_images(1), [1])
    assert other.generate(*asked, max_new_tokens=5) == vlm.generate(*asked, max_new_tokens=5)
    assert other.training and other.model.model.language_model.layers[0].training


def test_other_attention_and_dtype(vlm):
    eager = Qwen25VL.from_config(QWEN, attention="eager").eval()
    eager.load_state_dict(vlm.state_dict())
    assert eager.model.config._attn_implementation == "eager"
    real = mixed_inputs(vlm).attention_mask
    assert_close(eager(mixed_inputs(eager)).hidden[real], vlm(mixed_inputs(vlm)).hidden[real], rtol=0, atol=1e-5)
    half = Qwen25VL.from_config(QWEN, dtype="bfloat16")
    assert half(mixed_inputs(half)).hidden.dtype == torch.bfloat16
    queries, places, mask = torch.zeros(3, 2, 32).bfloat16(), torch.zeros(3, 3, 2).long(), torch.ones(3, 2, 2, dtype=torch.bool)
    assert half.language_stack(copied=False).eval()(queries, half.prefix(mixed_inputs(half)), places, mask).isfinite().all()


def test_text_alone_under_another_role(vlm):
    inputs = vlm.embed([[{"role": "generate", "text": "a red circle"}]], None, [0], for_generation=True)
    assert vlm.tokenizer.decode(inputs.token_ids[0].tolist()) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>generate\na red circle<|im_end|>\n<|im_start|>assistant\n"
    )
    output = vlm(inputs)
    assert output.loss == 0 and output.hidden.shape == inputs.embeddings.shape
