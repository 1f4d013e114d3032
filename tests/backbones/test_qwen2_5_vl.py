"""Qwen2.5-VL's wrapper against the library's own model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from umm_zoo.backbones.base import IGNORE
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL

# One token per 8 pixels, so a 32-pixel image is a grid of 4 x 4; attention windows of 2 x 2 tokens in the first vision block.
TINY = {
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 32,
    },
}
QUESTION = [{"role": "user", "text": "<image>\nWhat colour is the circle?"}]
CAPTION = [{"role": "user", "text": "<image>\nDescribe the image."}, {"role": "assistant", "text": "top left: a red circle"}]
PLAIN = [{"role": "user", "text": "Say yes."}, {"role": "assistant", "text": "yes"}]
EDIT = [
    {"role": "user", "text": "From <image> to <image>: what changed?"},
    {"role": "assistant", "text": "the circle is green"},
]


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    built = Qwen25VL.from_config(TINY)
    for parameter in built.parameters():  # the library's 0.02 leaves a model so flat that a wrong mask would not show
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return built.eval()


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


def test_labels_are_the_answer_and_its_end(vlm):
    inputs = mixed_inputs(vlm)
    for row, answer in enumerate(["top left: a red circle<|im_end|>", "yes<|im_end|>", "the circle is green<|im_end|>"]):
        kept = inputs.labels[row] != IGNORE
        assert vlm.tokenizer.decode(inputs.labels[row][kept].tolist()) == answer
        assert_close(inputs.labels[row][kept], inputs.token_ids[row][kept])


def test_images_go_to_their_own_rows(vlm):
    images = random_images(3)
    together = mixed_inputs(vlm)
    alone = vlm.embed([EDIT], images[1:], [2])
    assert_close(together.embeddings[2][together.attention_mask[2]], alone.embeddings[0], rtol=0, atol=1e-5)


def test_images_are_encoded_once_per_generation(vlm, monkeypatch):
    calls = []
    encode = vlm.encode_images
    monkeypatch.setattr(vlm, "encode_images", lambda images: calls.append(len(images)) or encode(images))
    vlm.sample([QUESTION, PLAIN[:1]], random_images(1), [1, 0], num_samples=3, max_new_tokens=4)
    assert calls == [1]


def test_windows_hold_back_what_full_attention_lets_through(vlm):
    images = random_images(1)
    changed = images.clone()
    changed[..., 16:] = 0  # the right half; windows are 16 pixels wide

    def left_changes(model):
        difference = (model.encode_images(images) - model.encode_images(changed)).view(4, 4, -1)
        return bool((difference[:, :2] != 0).any())

    windowed = copy.deepcopy(vlm)
    windowed.model.model.visual.fullatt_block_indexes = []
    assert left_changes(vlm) and not left_changes(windowed)


def test_left_padded_batch_answers_like_single_rows(vlm):
    images = random_images(1)
    together = vlm.sample([QUESTION, PLAIN[:1]], images, [1, 0], 1, max_new_tokens=6, temperature=0.0)
    for row, single in enumerate([([QUESTION], images, [1]), ([PLAIN[:1]], None, [0])]):
        alone = vlm.sample(*single, 1, max_new_tokens=6, temperature=0.0)
        length = alone.tokens.shape[1]
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        assert_close(together.log_probs[row, :length], alone.log_probs[0], rtol=0, atol=1e-4)


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
        eos_token_id=[vlm.tokenizer.eos_token_id, vlm._pad_id],
        pad_token_id=vlm._pad_id,
    )
    own = vlm.sample_from(inputs, 1, max_new_tokens=7, temperature=0.0)
    assert own.tokens.tolist() == expected[:, inputs.token_ids.shape[1] :].tolist()


def test_group_log_probs_are_those_of_a_whole_pass(vlm):
    inputs = vlm.embed([QUESTION, PLAIN[:1]], random_images(1), [1, 0], for_generation=True)
    samples = vlm.sample_from(inputs, 3, max_new_tokens=5, temperature=0.7, generator=torch.Generator().manual_seed(1))
    log_probs, mask = vlm.log_probs(vlm.with_answers(inputs, samples.tokens, samples.mask), temperature=0.7)
    assert len(samples.texts) == 6 and len({tuple(row) for row in samples.tokens[:3].tolist()}) > 1
    assert mask[:, -samples.tokens.shape[1] :].equal(samples.mask)
    assert_close(log_probs[mask], samples.log_probs[samples.mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [1, 5])
def test_answers_are_scored_from_the_cache_of_their_prompts(vlm, length, monkeypatch):
    inputs = vlm.embed([QUESTION, PLAIN[:1]], random_images(1), [1, 0], for_generation=True)
    samples = vlm.sample_from(inputs, 3, length, temperature=0.7, generator=torch.Generator().manual_seed(1))
    whole, mask = vlm.log_probs(vlm.with_answers(inputs, samples.tokens, samples.mask), temperature=1.3)
    prefix, seen = vlm.prefix(inputs), []
    going_on = vlm.continue_from
    monkeypatch.setattr(vlm, "_run", lambda *_: pytest.fail("read a prompt again"))
    monkeypatch.setattr(vlm, "continue_from", lambda _, new, *rest: seen.append(new.shape[1]) or going_on(_, new, *rest))
    found = vlm.answer_log_probs(prefix, samples.tokens, samples.mask, temperature=1.3)
    assert seen == ([samples.tokens.shape[1] - 1] if length > 1 else [])  # the answers alone were run
    assert_close(found[samples.mask], whole[mask], rtol=0, atol=1e-4)
    assert found.shape == (6, samples.tokens.shape[1]) and not found[~samples.mask].any()
    assert_close(vlm.answer_log_probs(prefix, samples.tokens, samples.mask, temperature=0.7), samples.log_probs, rtol=0, atol=1e-4)


def test_log_probs_reach_the_language_model(vlm):
    log_probs, mask = vlm.log_probs(mixed_inputs(vlm))
    assert_close(-log_probs.sum() / mask.sum(), vlm(mixed_inputs(vlm)).loss, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(log_probs.sum(), list(vlm.parts()["language_model"].parameters()))
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("for_generation", [False, True])
def test_prefix_and_continuation_are_one_pass(vlm, for_generation):
    inputs = vlm.embed([QUESTION, PLAIN[:1]], random_images(1), [1, 0], for_generation)
    prefix = vlm.prefix(inputs)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    new = (vlm._embedding(tokens), prefix.text_positions(3))
    states = vlm.continue_from(prefix, *new)
    explicit = vlm.continue_from(prefix, *new, torch.ones(2, 3, 3, dtype=torch.bool).tril())
    assert_close(explicit, states, rtol=0, atol=1e-5)
    for row, single in enumerate([([QUESTION], random_images(1), [1]), ([PLAIN[:1]], None, [0])]):
        alone = vlm.embed(*single, for_generation=for_generation)
        whole = vlm(vlm.with_answers(alone, tokens[row : row + 1], torch.ones(1, 3, dtype=torch.bool))).hidden[0]
        assert_close(states[row], whole[-3:], rtol=0, atol=1e-5)
        assert_close(prefix.last_hidden[row], whole[-4], rtol=0, atol=1e-5)


def test_prefix_holds_no_graph_and_is_not_grown_by_its_users(vlm):
    inputs = vlm.embed([QUESTION], random_images(1), [1])
    prefix = vlm.prefix(inputs)
    length = inputs.token_ids.shape[1]
    queries = torch.randn(1, 4, 32, requires_grad=True)
    states = vlm.continue_from(prefix, queries, prefix.text_positions(4))
    assert prefix.cache.get_seq_length() == length and not prefix.cache.layers[0].keys.requires_grad
    assert torch.autograd.grad(states.sum(), queries)[0].abs().sum() > 0
    assert_close(vlm.continue_from(prefix, queries, prefix.text_positions(4)), states)


def test_mask_among_new_tokens(vlm):
    prefix = vlm.prefix(vlm.embed([QUESTION], random_images(1), [1]))
    queries, positions = torch.randn(1, 4, 32), prefix.grid_positions(vlm.image_grid(16, 16))
    changed = queries.clone()
    changed[:, -1] += 1
    causal = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    assert_close(
        vlm.continue_from(prefix, queries, positions, causal), vlm.continue_from(prefix, queries, positions), rtol=0, atol=1e-5
    )
    assert_close(vlm.continue_from(prefix, changed, positions)[:, :-1], vlm.continue_from(prefix, queries, positions)[:, :-1])
    both = torch.ones_like(causal)
    difference = vlm.continue_from(prefix, changed, positions, both) - vlm.continue_from(prefix, queries, positions, both)
    assert (difference.abs().amax(-1) > 1e-4).all()


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
    vlm = Qwen25VL.from_config({**TINY, "tie_word_embeddings": tied})
    held = [id(parameter) for part in vlm.parts().values() for parameter in part.parameters()]
    assert len(held) == len(set(held)) and set(held) == {id(parameter) for parameter in vlm.parameters()}
    assert (vlm.model.lm_head.weight is vlm._embedding.weight) == tied


def test_frozen_parts_stay_asleep_and_without_gradient():
    vlm = Qwen25VL.from_config(TINY)
    freeze(vlm.parts()["vision_tower"])
    vlm.train()
    assert vlm.model.model.language_model.training and not any(block.training for block in vlm.model.model.visual.blocks)
    vlm(mixed_inputs(vlm)).loss.backward()
    assert all(parameter.grad is None for parameter in vlm.parts()["vision_tower"].parameters())
    for name in ("projector", "language_model"):
        assert all(parameter.grad.abs().sum() > 0 for parameter in vlm.parts()[name].parameters()), name


def test_gradient_checkpointing_changes_neither_gradient_nor_answer(vlm):
    other = Qwen25VL.from_config(TINY, gradient_checkpointing=True)
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
    eager = Qwen25VL.from_config(TINY, attention="eager").eval()
    eager.load_state_dict(vlm.state_dict())
    assert eager.model.config._attn_implementation == "eager"
    real = mixed_inputs(vlm).attention_mask
    assert_close(eager(mixed_inputs(eager)).hidden[real], vlm(mixed_inputs(vlm)).hidden[real], rtol=0, atol=1e-5)
    half = Qwen25VL.from_config(TINY, dtype="bfloat16")
    assert half(mixed_inputs(half)).hidden.dtype == torch.bfloat16
    assert half.continue_from(half.prefix(mixed_inputs(half)), torch.zeros(3, 2, 32).bfloat16(), torch.zeros(3, 3, 2).long(),
                              torch.ones(3, 2, 2, dtype=torch.bool)).isfinite().all()  # fmt: skip


def test_text_alone_under_another_role(vlm):
    inputs = vlm.embed([[{"role": "generate", "text": "a red circle"}]], None, [0], for_generation=True)
    assert vlm.tokenizer.decode(inputs.token_ids[0].tolist()) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>generate\na red circle<|im_end|>\n<|im_start|>assistant\n"
    )
    output = vlm(inputs)
    assert output.loss == 0 and output.hidden.shape == inputs.embeddings.shape


def test_users_mistakes_are_named(vlm):
    with pytest.raises(ValueError, match="row 0: found 1 <image> markers in the turns for 2 images"):
        vlm.embed([QUESTION], random_images(2), [2])
    with pytest.raises(ValueError, match="do not fit 1 conversations and 2 images"):
        vlm.embed([QUESTION], random_images(2), [1])
    with pytest.raises(ValueError, match="nothing is left to say"):
        vlm.generate([CAPTION], random_images(1), [1], 3)
