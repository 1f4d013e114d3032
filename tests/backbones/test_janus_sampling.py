"""Sampling of image tokens against the same tokens given to the model as they are, and against the library's own sampling."""

import pytest
import torch
from torch.testing import assert_close

from tests.backbones.janus_parts import TEXT, TEXTS, VISION, Thirds, janus, with_tokenizer
from umm_zoo.backbones import static_decoder
from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.image_sampling import draw, uniforms
from umm_zoo.backbones.static_decoder import StaticDecoder
from umm_zoo.backbones.unified import AttendedPadding, NullPrompt

SEEDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model():
    return janus()


@pytest.mark.parametrize("scale, tolerance", [(1.0, 1e-5), (5.0, 1e-4), (0.0, 1e-5)])
def test_log_probabilities_of_sampling_are_those_of_teacher_forcing(model, scale, tolerance):
    inputs = model.image_prompt(TEXTS)
    drawn = model.sample_image(inputs, SEEDS, scale, temperature=0.8)
    assert drawn.ids.shape == (4, 16) and not drawn.log_probs.requires_grad
    assert_close(model.image_log_probs(inputs, drawn.ids, scale, 0.8), drawn.log_probs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("form", [NullPrompt(), AttendedPadding()])
def test_every_form_of_guidance_is_sampled_as_it_is_scored(form):
    model = janus(unconditional=form)
    inputs = model.image_prompt(TEXTS)
    drawn = model.sample_image(inputs, SEEDS, 3.0)
    assert_close(model.image_log_probs(inputs, drawn.ids, 3.0), drawn.log_probs, atol=1e-4, rtol=0)


def test_greedy_tokens_with_guidance_are_the_librarys(tmp_path):
    model = with_tokenizer(tmp_path)
    inputs = model.image_prompt(TEXTS[:1])
    settings = model._whole[0].generation_config
    settings.bos_token_id, settings.pad_token_id = model.tokenizer.bos_token_id, model.pad_id
    settings.generation_kwargs = {"boi_token_id": int(inputs.token_ids[0, -1])}
    arguments = {"attention_mask": inputs.attention_mask.long(), "generation_mode": "image", "do_sample": False}
    for scale in (1.5, 5.0):  # 1 and less it cannot do
        theirs = model._whole[0].generate(input_ids=inputs.token_ids, guidance_scale=scale, **arguments)
        assert torch.equal(model.sample_image(inputs, [0], scale, temperature=0.0).ids, theirs)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_guidance_of_one_and_less(model, scale):
    drawn = model.sample_image(model.image_prompt(TEXTS), SEEDS, scale, temperature=0.0)
    chances = torch.stack([_logits(model, drawn.ids, scale)[:, n] for n in range(16)], 1)
    assert torch.equal(chances.argmax(-1), drawn.ids)


def _logits(model, ids, scale):
    inputs = model.image_prompt(TEXTS)
    rows = [model.image_logits(prompt, ids) for prompt in (inputs, model.unconditional(inputs))]
    return rows[1] + scale * (rows[0] - rows[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_alone_is_what_it_is_in_a_padded_batch(model, temperature):
    together = model.sample_image(model.image_prompt(TEXTS), SEEDS, 3.0, temperature)
    for row, text in enumerate(TEXTS):
        own = model.sample_image(model.image_prompt([text]), SEEDS[2 * row : 2 * row + 2], 3.0, temperature)
        assert torch.equal(own.ids, together.ids[2 * row : 2 * row + 2])
    one = model.sample_image(model.image_prompt(TEXTS[1:]), SEEDS[3:], 3.0, temperature)
    assert torch.equal(one.ids[0], together.ids[3])


def test_attended_padding_of_a_batch_is_seen():
    model = janus(unconditional=AttendedPadding())
    alone, inputs = model.image_prompt(TEXTS[:1]), model.image_prompt(TEXTS)
    ids = torch.arange(16)[None]
    difference = model.image_log_probs(alone, ids, 3.0) - model.image_log_probs(inputs, ids.expand(2, -1), 3.0)[:1]
    assert difference.abs().max() > 0.1


def test_equal_seeds_make_equal_images_and_others_do_not(model):
    inputs = model.image_prompt(TEXTS[:1])
    ids = model.sample_image(inputs, [1, 2, 1]).ids
    assert torch.equal(ids[0], ids[2]) and not torch.equal(ids[0], ids[1])
    torch.manual_seed(1)
    assert torch.equal(model.sample_image(inputs, [2]).ids[0], ids[1])


def test_draws_follow_the_distribution():
    logits, count = torch.tensor([0.0, 2.0, -torch.inf, 1.0, -3.0]), 40_000
    ids, chances = draw(logits.expand(count, -1), torch.arange(count, dtype=torch.float64) / count, temperature=2.0)
    expected = (logits / 2).softmax(-1)
    assert_close(ids.bincount(minlength=5) / count, expected, atol=1e-4, rtol=0)
    assert_close(chances, expected[ids])


def test_what_cannot_be_is_never_drawn():
    numbers = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1), numbers)[0].tolist() == [1, 2]


def test_only_the_likeliest_are_drawn_and_scored_as_such():
    logits = torch.tensor([[0.0, 2.0, 1.0, -3.0]]).expand(2, -1)
    ids, chances = draw(logits, torch.tensor([0.7, 0.9], dtype=torch.float64), top_k=2)
    assert ids.tolist() == [1, 2]
    assert_close(chances, torch.tensor([2.0, 1.0]).softmax(-1))


def test_top_k_of_one_is_greedy(model):
    inputs = model.image_prompt(TEXTS)
    found = model.sample_image(inputs, SEEDS, 3.0, top_k=1)
    assert torch.equal(found.ids, model.sample_image(inputs, SEEDS, 3.0, temperature=0.0).ids)
    assert_close(found.log_probs, torch.zeros(4, 16))


def test_numbers_of_a_row_are_its_own():
    assert torch.equal(uniforms([3, 4, 3], 5)[[0, 1]], torch.stack([uniforms([3], 5)[0], uniforms([4], 9)[0, :5]]))


@pytest.mark.parametrize("targets", [None, ["k_proj", "down_proj"]])
def test_an_adapter_counts(targets):
    model, adapter = janus(), LoRA(rank=2, alpha=4.0, targets=targets)
    inputs, before = model.image_prompt(TEXTS), model.sample_image(model.image_prompt(TEXTS), SEEDS)
    adapter.attach(model.language_model)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    drawn = model.sample_image(inputs, SEEDS)
    assert not torch.equal(drawn.ids, before.ids)
    assert_close(model.image_log_probs(inputs, drawn.ids), drawn.log_probs, atol=1e-5, rtol=0)
    with adapter.disabled():
        assert torch.equal(model.sample_image(inputs, SEEDS).ids, before.ids)


def test_dropout_is_off_while_images_are_sampled(model):
    busy, mode = janus(), []
    busy.train()
    for layer in (busy.image_head, busy.text_model.layers[1].self_attn.k_proj):
        layer.register_forward_pre_hook(lambda own, _: mode.append(own.training))
    inputs = model.image_prompt(TEXTS)
    assert torch.equal(busy.sample_image(inputs, SEEDS).ids, model.sample_image(inputs, SEEDS).ids)
    assert busy.text_model.training and busy.image_head.training
    assert len(mode) == 16 + 1 + 15 and not any(mode)  # the head for every token; the layer for the prompt and all but the last


def test_steps_that_are_told_by_a_tensor_are_the_same(model, monkeypatch):
    """What a CUDA graph records: places are read from a tensor, and the whole buffers are looked at."""
    inputs = model.image_prompt(TEXTS)
    expected = model.sample_image(inputs, SEEDS, 3.0)

    def recorded(advance, length, device, start_over):
        for number in [0, *range(length)]:  # the first step is taken twice: a graph is warmed up
            start_over() if not number else None
            advance(torch.tensor([number]))

    monkeypatch.setattr("umm_zoo.backbones.janus.in_turn", recorded)
    found = model.sample_image(inputs, SEEDS, 3.0)
    assert torch.equal(found.ids, expected.ids)
    assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)


def test_prompts_may_be_encoded_a_few_at_a_time(model, monkeypatch):
    inputs = model.image_prompt([TEXTS[0], TEXTS[1], "blue", "a red square"])
    expected = model.sample_image(inputs, SEEDS, 3.0)
    monkeypatch.setattr(static_decoder, "_TOKENS", 2 * inputs.token_ids.shape[1])
    assert torch.equal(model.sample_image(inputs, SEEDS, 3.0).ids, expected.ids)


def test_large_layers_are_not_joined(model, monkeypatch):
    expected = model.sample_image(model.image_prompt(TEXTS), SEEDS).ids
    monkeypatch.setattr(static_decoder, "_SMALL", 0)
    assert torch.equal(model.sample_image(model.image_prompt(TEXTS), SEEDS).ids, expected)


def test_equal_prompts_are_encoded_once(model, monkeypatch):
    seen, encode = [], StaticDecoder.encode
    monkeypatch.setattr(StaticDecoder, "encode", lambda own, states: seen.append(len(states)) or encode(own, states))
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], "a red square"]  # the first and the last are of one length
    found = model.sample_image(model.image_prompt(texts), SEEDS, 3.0)
    assert seen == [3 + 2]
    for row, text in enumerate(texts):
        assert torch.equal(model.sample_image(model.image_prompt([text]), SEEDS[row : row + 1], 3.0).ids[0], found.ids[row])


def test_keys_and_values_do_not_move(model):
    inputs = model.image_prompt(TEXTS)
    decoder = StaticDecoder(model.text_model, inputs.attention_mask, torch.tensor([0, 0, 1, 1]), 3)
    places = [part.data_ptr() for part in decoder.keys + decoder.values]
    hidden = decoder.encode(inputs.embeddings)
    assert_close(hidden[::2], model.prefix(inputs).last_hidden, atol=1e-5, rtol=0)
    for step in range(3):
        hidden = decoder(hidden, step)
    assert places == [part.data_ptr() for part in decoder.keys + decoder.values]


def test_images_of_another_codec_have_its_number_of_tokens():
    model = janus({"text_config": TEXT, "vision_config": VISION}, codec=Thirds())
    drawn = model.sample_image(model.image_prompt(TEXTS), SEEDS)
    assert drawn.ids.shape == (4, 4) and int(drawn.ids.max()) < 27
    assert model.codec.images(drawn.ids[..., None]).shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    "seeds, arguments, said",
    [
        ([1, 2, 3], {}, "found 3 seeds, expected a multiple of 2 prompts"),
        ([], {}, "found 0 seeds, expected a multiple of 2 prompts"),
        ([1, 2], {"temperature": -1.0}, "found temperature -1.0 and top_k None, expected 0 or more and 1 or more"),
        ([1, 2], {"top_k": 0}, "found temperature 1.0 and top_k 0"),
    ],
)
def test_numbers_out_of_range_are_refused(model, seeds, arguments, said):
    with pytest.raises(ValueError, match=said):
        model.sample_image(model.image_prompt(TEXTS), seeds, **arguments)


@pytest.mark.parametrize("cast", [True, False])
def test_half_precision(model, cast):
    """Sampled and scored in bfloat16 throughout, or under autocast; both only nearly alike (no bound of float32 holds)."""
    own = janus().bfloat16() if cast else model
    inputs = own.image_prompt(TEXTS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not cast):
        drawn = own.sample_image(inputs, SEEDS, 1.0)
        scored = own.image_log_probs(inputs, drawn.ids)
    assert drawn.log_probs.dtype == scored.dtype == torch.float32
    assert (drawn.log_probs - scored).abs().mean() < 0.1
    assert (model.image_log_probs(model.image_prompt(TEXTS), drawn.ids) - drawn.log_probs).abs().mean() < 0.2
