"""LlavaBackbone against the library's own LlavaForConditionalGeneration."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlavaForConditionalGeneration

from tests.backbones.vlm_parts import CLIP, CONVERSATIONS, COUNTS, LLAVA, PROMPTS, assistant, library_answers, random_images, user
from tests.backbones.vlm_parts import llava as build
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.templates import Plain, VicunaV1
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError

SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "image_size": 14}  # the last 2 pixels belong to no patch


@pytest.fixture(scope="module")
def backbone():
    return build().eval()


@pytest.fixture(scope="module")
def images(backbone):
    return random_images(backbone)


@pytest.mark.parametrize("vision, layer", [(CLIP, -2), (CLIP, [1, -1]), (SIGLIP, -2)])
def test_loss_and_logits_are_the_librarys(vision, layer):
    own = build({**LLAVA, "vision_config": vision, "vision_feature_layer": layer}).eval()
    images = torch.rand(3, 3, own.image_size, own.image_size) * 2 - 1
    inputs = own.embed(CONVERSATIONS, images, COUNTS)
    output = own(inputs)
    theirs = own._whole[0](
        input_ids=inputs.token_ids,
        pixel_values=own.normalise(images),
        attention_mask=inputs.attention_mask.long(),
        labels=inputs.labels,
        vision_feature_layer=layer,
        vision_feature_select_strategy=own.config.vision_feature_select_strategy,
    )
    assert_close(output.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    kept = inputs.attention_mask
    assert_close(own.language_model.lm_head(output.hidden)[kept], theirs.logits[kept], atol=1e-5, rtol=1e-5)
    assert_close(output.nll.sum() / output.num_tokens.sum(), output.loss)


def test_pixels_are_what_the_librarys_processor_makes(backbone):
    from transformers.models.clip import CLIPImageProcessorPil

    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    theirs = torch.as_tensor(processor(image.permute(1, 2, 0).numpy(), return_tensors="np")["pixel_values"][0])
    assert_close(backbone.normalise(image[None] / 127.5 - 1)[0], theirs, atol=1e-5, rtol=1e-5)


def test_greedy_generation_is_the_librarys(backbone, images):
    assert backbone.generate(PROMPTS, images, COUNTS, max_new_tokens=12) == library_answers(backbone, images, 12)


def test_a_frozen_tower_keeps_no_graph_and_the_projector_learns(images):
    own = build()
    freeze(own.vision_tower), freeze(own.language_model)
    own.train()
    own(own.embed(CONVERSATIONS, images, COUNTS)).loss.backward()
    trained = {name for name, parameter in own.named_parameters() if parameter.grad is not None}
    assert trained == {f"projector.{name}" for name, _ in own.projector.named_parameters()}
    with torch.no_grad():
        own.projector.linear_1.weight.zero_()
    before = own.encode_images(images)[0]
    assert before.grad_fn is not None and not own.vision_tower.training


@pytest.mark.parametrize("vision, layer, rested", [(CLIP, -2, 1), (CLIP, -1, 0), (SIGLIP, 1, 2)])
def test_every_parameter_with_gradient_gets_one(vision, layer, rested):
    own = build({**LLAVA, "vision_config": vision, "vision_feature_layer": layer})
    images = torch.rand(3, 3, own.image_size, own.image_size)
    own(own.embed(CONVERSATIONS, images, COUNTS)).loss.backward()
    wanting = {name for name, parameter in own.named_parameters() if parameter.requires_grad}
    assert wanting == {name for name, parameter in own.named_parameters() if parameter.grad is not None}
    still = [all(not p.requires_grad for p in block.parameters()) for block in own.vision_tower.encoder.layers]
    assert still == [False] * (3 - rested) + [True] * rested


def test_a_batch_without_images_touches_the_same_parameters():
    own = build()
    own(own.embed(CONVERSATIONS[2:], None, [0])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in own.projector.parameters())


def test_gradient_checkpointing_changes_no_gradient(images):
    plain, saving = build(), build(gradient_checkpointing=True)
    for own in (plain, saving):
        freeze(own.language_model)  # stage 1: the library itself would not recompute in a frozen decoder
        own.train()
        own(own.embed(CONVERSATIONS, images, COUNTS)).loss.backward()
    assert any("Checkpoint" in type(layer).__name__ or layer.gradient_checkpointing for layer in saving.text_model.layers)
    assert all(layer.training for layer in saving.text_model.layers)
    assert not any(layer.self_attn.training for layer in saving.text_model.layers)
    for one, other in zip(plain.projector.parameters(), saving.projector.parameters(), strict=True):
        assert_close(one.grad, other.grad)


def test_a_cut_never_goes_through_an_image(images):
    short = build(max_length=16).eval()
    with pytest.raises(ValueError, match="found 31 tokens, of which max_length 16 would cut off 7 image tokens"):
        short.embed([[user("Here is the image: is it red?<image>"), assistant("no")]], images[:1], [1])
    cut = build(max_length=24).eval().embed([[user("<image>"), assistant("a large red circle at the top left")]], images[:1], [1])
    assert cut.token_ids.shape == (1, 24)
    with pytest.raises(ValueError, match="cut off the end of a question"):
        short.embed([[user("<image>a large red circle?")]], images[:1], [1], for_generation=True)


def test_a_cut_that_leaves_no_answer_is_refused_and_never_trained_as_a_loss_of_zero(images):
    row = [user("<image>what is in the image, and where is it?"), assistant("red")]
    whole = build(max_length=200).eval()
    first = whole.embed([row], images[:1], [1]).labels[0].ne(-100).nonzero()[0].item()
    short, batch = build(max_length=first).eval(), Batch(["a"], [row], images[:1], [1])
    with pytest.raises(ValueError, match=f"max_length {first} would cut off every answer"):
        short.embed([row], images[:1], [1])
    assert "would cut off every answer" in refusal(short.check_rows, batch)
    one_more = build(max_length=first + 1).eval()
    assert not refusal(one_more.check_rows, batch) and one_more.embed([row], images[:1], [1]).labels[0].ne(-100).sum() == 1
    asked = [user("<image>what is in the image, and where is it?")]  # a row without an answer loses none
    assert short.embed([asked], images[:1], [1]).token_ids.shape[1] <= first


def refusal(call, *arguments) -> str:
    """What a call refuses with its row; empty where it does not."""
    try:
        call(*arguments)
        return ""
    except UserError as error:
        return f"{error.row}: {error}"


@pytest.mark.parametrize("for_generation", [False, True])
def test_rows_are_refused_that_would_not_be_embedded(images, for_generation):
    short, refusals = build(max_length=40).eval(), []
    for words in range(0, 40, 3):
        turns = [[user("<image>" + "red " * words)], [user("red " * words + "<image>"), assistant("no " * words)]]
        batch = Batch(["a", "b"], turns, images[:2].to("meta"), [1, 1])
        refusals.append(refusal(short.check_rows, batch, for_generation))
        conversations = batch.prompts() if for_generation else turns
        assert refusals[-1] == refusal(short.embed, conversations, images[:2], [1, 1], for_generation)
    assert not refusals[0] and "tokens, of which max_length 40 would cut off" in refusals[-1]


def test_images_of_another_size_are_refused(backbone):
    with pytest.raises(ValueError, match="found images of 16x16 pixels, expected the vision tower's 12x12"):
        backbone.embed(CONVERSATIONS[:1], torch.zeros(1, 3, 16, 16), [1])


def test_saved_and_loaded_back_bit_equal(backbone, images, tmp_path):
    backbone.save(tmp_path)
    again = LlavaBackbone.from_pretrained(str(tmp_path), config=LLAVA).eval()
    for (name, one), (other_name, other) in zip(backbone.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other)
    first, second = (own(own.embed(CONVERSATIONS, images, COUNTS)).loss for own in (backbone, again))
    assert torch.equal(first, second)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, backbone.language_model.lm_head.weight)
    with pytest.raises(ValueError, match=r"config\.text_config\.hidden_size: found 32, expected 24 as in"):
        LlavaBackbone.from_pretrained(str(tmp_path), config={"text_config": {"hidden_size": 32}})


def test_dtype_and_attention_are_selectable(images, tmp_path):
    build().save(tmp_path)
    half = LlavaBackbone.from_pretrained(str(tmp_path), dtype="bfloat16", attention="eager").eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    output = half(half.embed(CONVERSATIONS, images, COUNTS))
    whole = build().eval()
    expected = whole(whole.embed(CONVERSATIONS, images, COUNTS)).loss
    assert output.loss.dtype == torch.float32
    assert_close(output.loss, expected, atol=0.05, rtol=0.02)
    with pytest.raises(ValueError, match="dtype: found 'float17'"):
        build(dtype="float17")


def test_other_templates_generate(images):
    vicuna = build(template=VicunaV1(end="<|im_end|>")).eval()
    inputs = vicuna.embed(CONVERSATIONS, images, COUNTS)
    assert vicuna.tokenizer.decode(inputs.labels[0][inputs.labels[0] != -100]) == " red<|im_end|>"
    plain = build(template=Plain()).eval()
    inputs = plain.embed(CONVERSATIONS[:1], images[:1], [1])
    assert plain.tokenizer.decode(inputs.token_ids[0, 9:]) == "red\n"
    assert all("\n" not in text for text in plain.generate(PROMPTS[:1], images[:1], [1], 20))
    with pytest.raises(ValueError, match="found '</s>', expected a token of the tokenizer"):
        build(template=VicunaV1()).embed(CONVERSATIONS, images, COUNTS)


def test_parts_hold_every_parameter_once(backbone):
    inside = [id(p) for part in backbone.parts().values() for p in part.parameters()]
    assert sorted(inside) == sorted(id(p) for p in backbone.parameters())
    assert set(backbone.parts()) == {"vision_tower", "projector", "language_model"}
