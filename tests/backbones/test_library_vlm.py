"""Claims about every vision-language model of the library, whatever its family."""

import pytest
import torch
from torch.testing import assert_close

from tests.backbones.vlm_parts import CONVERSATIONS, COUNTS, PROMPTS, assistant, llava, qwen, random_images, user
from umm_zoo.backbones.generation import take_rows
from umm_zoo.backbones.templates import IGNORE
from umm_zoo.errors import UserError


@pytest.fixture(scope="module", params=[llava, qwen], ids=["llava", "qwen"])
def vlm(request):
    return request.param().eval()


@pytest.fixture(scope="module")
def images(vlm):
    return random_images(vlm)


def one_by_one(vlm, images):
    """Conversation, images and counts of each row alone."""
    return [(slice(row, row + 1), own, COUNTS[row : row + 1]) for row, own in enumerate((images[:1], images[1:], None))]


def test_only_answers_and_their_end_are_trained(vlm, images):
    inputs = vlm.embed(CONVERSATIONS, images, COUNTS)
    decoded = [vlm.tokenizer.decode(row[row != IGNORE]) for row in inputs.labels]
    assert decoded == ["red<|im_end|>", "no<|im_end|>the second image is green.<|im_end|>", "yes<|im_end|>"]
    assert (inputs.labels == inputs.token_ids)[inputs.labels != IGNORE].all()
    cells = vlm.image_grid(*images.shape[-2:]).num_cells
    assert inputs.image_mask.sum(dim=1).tolist() == [cells, 2 * cells, 0]
    assert vlm(inputs).num_tokens.tolist() == (inputs.labels != IGNORE).sum(dim=1).tolist()


def test_image_features_stand_at_the_image_mask_in_order(vlm, images):
    inputs = vlm.embed(CONVERSATIONS, images, COUNTS)
    assert_close(inputs.embeddings[inputs.image_mask].view(3, -1, vlm.width), torch.stack(vlm.encode_images(images)))
    alone = vlm.embed(CONVERSATIONS[1:2], images[1:], [2])
    assert_close(alone.embeddings[0], inputs.embeddings[1, : alone.embeddings.shape[1]])


def test_logits_are_formed_only_at_labels(vlm, images):
    seen = []
    handle = vlm.lm_head.register_forward_hook(lambda module, given, made: seen.append(made.shape))
    inputs = vlm.embed(CONVERSATIONS, images, COUNTS)
    vlm(inputs)
    handle.remove()
    assert seen == [((inputs.labels != IGNORE).sum(), 1024)]


def test_padding_changes_no_row(vlm, images):
    together = vlm(vlm.embed(CONVERSATIONS, images, COUNTS))
    for row, (own, shown, counts) in enumerate(one_by_one(vlm, images)):
        alone = vlm(vlm.embed(CONVERSATIONS[own], shown, counts))
        assert_close(together.nll[row], alone.nll[0], atol=1e-5, rtol=1e-5)


def test_left_padded_rows_answer_as_each_does_alone(vlm, images):
    together = vlm.sample(PROMPTS, images, COUNTS, 1, max_new_tokens=8, temperature=0.0)
    assert len(set(together.texts)) > 1
    for row, (own, shown, counts) in enumerate(one_by_one(vlm, images)):
        alone = vlm.sample(PROMPTS[own], shown, counts, 1, max_new_tokens=8, temperature=0.0)
        length = alone.tokens.shape[1]
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        assert_close(together.log_probs[row, :length], alone.log_probs[0], rtol=0, atol=1e-4)


def test_generation_encodes_each_image_once(vlm, images, monkeypatch):
    calls, encode = [], vlm.encode_images
    monkeypatch.setattr(vlm, "encode_images", lambda shown: calls.append(len(shown)) or encode(shown))
    vlm.sample(PROMPTS, images, COUNTS, num_samples=3, max_new_tokens=4)
    assert calls == [3]


def test_temperature_draws_from_the_generator(vlm, images):
    draws = [
        vlm.generate(PROMPTS, images, COUNTS, 6, temperature=1.5, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_log_probs_of_a_group_are_those_of_a_whole_pass(vlm, images):
    inputs = vlm.embed(PROMPTS, images, COUNTS, for_generation=True)
    samples = vlm.sample_from(inputs, 3, max_new_tokens=5, temperature=0.7, generator=torch.Generator().manual_seed(1))
    log_probs, mask = vlm.log_probs(vlm.with_answers(inputs, samples.tokens, samples.mask), temperature=0.7)
    assert len(samples.texts) == 9 and len({tuple(row) for row in samples.tokens[:3].tolist()}) > 1
    assert mask[:, -samples.tokens.shape[1] :].equal(samples.mask)
    assert_close(log_probs[mask], samples.log_probs[samples.mask], rtol=0, atol=1e-4)


def test_log_probs_reach_the_language_model(vlm, images):
    inputs = vlm.embed(CONVERSATIONS, images, COUNTS)
    log_probs, mask = vlm.log_probs(inputs)
    assert_close(-log_probs.sum() / mask.sum(), vlm(inputs).loss, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(log_probs.sum(), list(vlm.parts()["language_model"].parameters()))
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("again", [False, True])
def test_answers_have_the_gradient_of_whole_rows(again, vlm, images):
    inputs, owners = vlm.embed(PROMPTS, images, COUNTS, for_generation=True), torch.tensor([2, 0, 2, 1])
    tokens, mask = torch.randint(5, 20, (4, 3)), torch.arange(3) < torch.tensor([[3], [1], [2], [3]])
    weights, whole = list(vlm.parts()["language_model"].parameters()), vlm.with_answers(take_rows(inputs, owners), tokens, mask)
    expected = torch.autograd.grad(vlm.log_probs(whole)[0].square().sum(), weights, retain_graph=True)
    if again:
        vlm.text_model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        found = torch.autograd.grad(vlm.answer_log_probs(inputs, tokens, mask, owners).square().sum(), weights)
    finally:
        vlm.text_model.gradient_checkpointing_disable()
    assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_prompt_is_encoded_without_a_graph(vlm, images):
    inputs = vlm.embed(PROMPTS, images, COUNTS, for_generation=True)
    prefix = vlm.prefix(inputs)
    assert prefix.cache.get_seq_length() == inputs.token_ids.shape[1] and not prefix.cache.layers[0].keys.requires_grad
    assert_close(prefix.last_hidden, vlm(inputs).hidden[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("conversation", "count", "message"),
    [
        ([user("no marker")], 1, "found 0 <image> markers, expected 1, one for each image"),
        ([user("<image>?"), assistant("<image>")], 0, "found 1 <image> markers, expected 0"),
    ],
)
def test_markers_and_images_must_agree(vlm, images, conversation, count, message):
    with pytest.raises(UserError, match=message) as refused:
        vlm.embed([conversation], images[:1] if count else None, [count])
    assert refused.value.row == 0


def test_other_mistakes_are_named(vlm, images):
    with pytest.raises(ValueError, match=r"image_counts: found \[1\], expected 1 numbers .* with the sum 3"):
        vlm.embed(PROMPTS[:1], images, [1])
    with pytest.raises(UserError, match="found an assistant turn at the end, expected a question") as refused:
        vlm.generate(CONVERSATIONS, images, COUNTS, 3)
    assert refused.value.row == 0
