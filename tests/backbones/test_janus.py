"""Janus against the library's own model, its parts, its files, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import JanusForConditionalGeneration
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.processing_janus import JanusProcessor

from tests.backbones.janus_parts import JANUS, TEXT, TEXTS, VISION, VQ, Thirds, janus, tokenizer_folder, with_tokenizer, with_vq
from tests.backbones.vlm_parts import CONVERSATIONS, COUNTS, PROMPTS, assistant, library_answers, random_images, user
from umm_zoo.backbones.frozen import FrozenBackbone
from umm_zoo.backbones.janus import Janus
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.templates import ChatML, JanusChat, QwenChat
from umm_zoo.errors import UserError
from umm_zoo.testing import check_block


@pytest.fixture(scope="module")
def model():
    return janus()


@pytest.fixture(scope="module")
def images(model):
    return random_images(model)


IDS = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(4))


# -- reading -----------------------------------------------------------------------------------------------------------------


def test_losses_of_texts_are_the_librarys(model, images):
    inputs = model.embed(CONVERSATIONS, images, COUNTS)
    theirs = model._whole[0](
        input_ids=inputs.token_ids,
        pixel_values=model.normalise(images),
        attention_mask=inputs.attention_mask.long(),
        labels=inputs.labels,
    )
    output = model(inputs)
    assert_close(output.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    kept = inputs.attention_mask
    assert_close(model.lm_head(output.hidden)[kept], theirs.logits[kept], atol=1e-5, rtol=1e-5)


def test_greedy_answers_are_the_librarys(model, images):
    assert model.generate(PROMPTS, images, COUNTS, max_new_tokens=9) == library_answers(model, images, 9)


def test_pixels_are_what_the_librarys_processor_makes(model):
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    processor = JanusImageProcessorPil(size={"height": 8, "width": 8}, min_size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    theirs = torch.as_tensor(processor(image.permute(1, 2, 0).numpy(), return_tensors="np")["pixel_values"][0])
    assert_close(model.normalise(image[None] / 127.5 - 1)[0], theirs, atol=1e-5, rtol=1e-5)


# -- image tokens ------------------------------------------------------------------------------------------------------------


def test_image_logits_are_the_librarys_modules_one_after_the_other(model):
    inputs, whole = model.image_prompt(TEXTS), model._whole[0]
    rows = torch.arange(2).repeat_interleave(2)
    embeddings = torch.cat([inputs.embeddings[rows], whole.prepare_embeddings_for_image_generation(IDS)], 1)
    mask = torch.cat([inputs.attention_mask[rows], torch.ones_like(IDS, dtype=torch.bool)], 1)
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    states = whole.model.language_model(inputs_embeds=embeddings, attention_mask=mask, position_ids=places).last_hidden_state
    expected = whole.model.generation_head(states[:, -17:-1])
    assert_close(model.image_logits(inputs, IDS), expected, atol=1e-5, rtol=1e-5)


def test_no_image_token_sees_a_later_one(model):
    inputs, changed = model.image_prompt(TEXTS), IDS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 20
    one, other = model.image_logits(inputs, IDS), model.image_logits(inputs, changed)
    assert torch.equal(one[:, :8], other[:, :8]) and not torch.equal(one[:, 8], other[:, 8])


def test_a_caption_is_all_that_an_image_is_generated_from(model, images):
    """Another image behind the same words changes nothing: the words stand in a conversation of their own."""
    found = []
    for shown in (images[:2], images[1:].flip(-1)):
        captions = model.embed([[user("<image>Describe it."), assistant(text)] for text in TEXTS], shown, [1, 1])
        found.append((model(captions).loss, model.image_logits(model.image_prompt(TEXTS), IDS)))
    assert found[0][0] != found[1][0] and torch.equal(found[0][1], found[1][1])


def test_a_row_of_image_tokens_does_not_depend_on_the_prompts_beside_it(model):
    together = model.image_logits(model.image_prompt(TEXTS), IDS)
    for row, text in enumerate(TEXTS):
        own = slice(2 * row, 2 * row + 2)
        assert_close(model.image_logits(model.image_prompt([text]), IDS[own]), together[own], atol=1e-5, rtol=1e-5)


def test_prompts_end_in_the_token_that_opens_an_image(model, tmp_path):
    inputs = model.image_prompt(TEXTS)
    assert model.tokenizer.convert_ids_to_tokens(inputs.token_ids[:, -1].tolist()) == ["<|vision_start|>"] * 2
    assert inputs.attention_mask[1].all() and not inputs.attention_mask[0, 0] and not inputs.image_mask.any()
    with pytest.raises(ValueError, match="template: found ChatML, expected one that opens an image"):
        janus(template=ChatML())


def test_a_prompt_that_leaves_no_place_for_the_image_is_refused():
    model = janus({**JANUS, "text_config": {**TEXT, "max_position_embeddings": 64}})
    length = model.image_prompt(["red " * 9]).token_ids.shape[1]
    with pytest.raises(UserError, match=r"found \d+ tokens, expected at most 48 in a prompt for an image") as refused:
        model.image_prompt(["red", "red " * 60])
    assert refused.value.row == 1 and length <= 48


# -- structure ---------------------------------------------------------------------------------------------------------------


def test_parts_hold_every_parameter_once(model):
    inside = [id(p) for part in model.parts().values() for p in part.parameters()]
    assert sorted(inside) == sorted(id(p) for p in model.parameters())
    reading = ["vision_tower", "projector", "language_model"]
    assert list(model.parts()) == [*reading, "image_embeddings", "image_projector", "image_head", "codec"]


def test_both_losses_reach_every_part_but_the_codec(images):
    model = janus()
    loss = model(model.embed(CONVERSATIONS, images, COUNTS)).loss
    (loss - model.image_log_probs(model.image_prompt(TEXTS), IDS).mean()).backward()
    untouched = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untouched == {"codec"} and isinstance(model.codec, FrozenBackbone)


def test_contracts(model, images):
    with torch.no_grad():
        inputs = model.embed(CONVERSATIONS, images, COUNTS)
    others = [name for name, _ in model.named_parameters() if "language_model" not in name or "embed_tokens" in name]
    check_block(model, (inputs,), (), dtypes=(torch.float32,), unused=others)
    check_block(Thirds())


def test_another_codec_takes_the_place_of_the_librarys():
    plain = {"text_config": TEXT, "vision_config": VISION}
    model = janus({**plain, "vq_config": {"embed_dim": 6}}, codec=Thirds())
    assert model.image_embeddings.weight.shape == (27, 6) and model.image_head.vision_head.out_features == 27
    assert not hasattr(model._whole[0].model, "vqmodel") and list(model.codec.parameters()) == []
    assert model.image_logits(model.image_prompt(TEXTS), IDS[:, :4]).shape == (4, 4, 27)
    with pytest.raises(ValueError, match=r"config.vq_config.num_embeddings: found 20, expected 27, the codes of the codec"):
        janus({**plain, "vq_config": {"num_embeddings": 20}}, codec=Thirds())


def test_an_odd_size_of_image_is_refused_where_the_codec_cannot_cut_it():
    vision = {**VISION, "image_size": 6}
    with pytest.raises(UserError, match="found 6 x 6 px, expected multiples of 4 px"):
        janus({"text_config": TEXT, "vision_config": vision}, codec=Thirds())


def test_output_layers_are_the_texts_own_unless_stated(model):
    tied = janus({**JANUS, "tie_word_embeddings": True})
    assert model.lm_head.weight is not model.text_model.embed_tokens.weight
    assert tied.lm_head.weight is tied.text_model.embed_tokens.weight


@pytest.mark.parametrize(
    "part, changed, said",
    [
        ("vision_config", {"projection_dim": 23}, "vision_config.projection_dim: found 23, expected 24, the width of the language"),
        ("vq_config", {"projection_dim": 23}, "vq_config.projection_dim: found 23, expected 24"),
        ("vq_config", {"image_token_embed_dim": 23}, "vq_config.image_token_embed_dim: found 23, expected 24"),
        ("vision_config", {"num_image_tokens": 15}, "vision_config.num_image_tokens: found 15, expected 16, the square of"),
        ("vision_config", {"image_size": 9}, "vision_config.image_size: found 9, expected a multiple of the patches' 2"),
        ("vision_config", {"patch_size": 4}, r"vision_config.patch_size: found 4, expected 2, which channel_multiplier \[1, 1\]"),
        (
            "vq_config",
            {"base_channels": 48},
            r"vq_config: found base_channels \* channel_multiplier = 48, expected",
        ),
        ("vision_config", {"num_attention_heads": 3}, "vision_config.hidden_size: found 16, expected a multiple of the 3 heads"),
        ("text_config", {"model_type": "qwen2"}, "text_config.model_type: found 'qwen2', expected 'llama'"),
        ("vision_config", {"patch": 2}, "vision_config: found 'patch', expected .*did you mean 'patch_size'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(part, changed, said):
    with pytest.raises(ValueError, match=said) as refused:
        janus({**JANUS, part: {**JANUS[part], **changed}})
    assert "\n" not in str(refused.value)


# -- files -------------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_back_bit_equal(model, images, tmp_path):
    model.save(tmp_path)
    again = Janus.from_pretrained(str(tmp_path), config=JANUS).eval()
    for (name, one), (other_name, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other)
    for own in (model, again):
        own.found = own(own.embed(CONVERSATIONS, images, COUNTS)).loss, own.image_logits(own.image_prompt(TEXTS), IDS)
    assert all(torch.equal(one, other) for one, other in zip(model.found, again.found, strict=True))
    assert torch.equal(JanusForConditionalGeneration.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match=r"config\.vq_config\.num_embeddings: found 21, expected 20 as in"):
        Janus.from_pretrained(str(tmp_path), config=with_vq(num_embeddings=21))
    with torch.device("meta"):
        planned = Janus.from_pretrained(str(tmp_path))
    assert sum(p.numel() for p in planned.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_model_with_another_codec_is_saved_without_one(tmp_path):
    model = janus({"text_config": TEXT, "vision_config": VISION}, codec=Thirds())
    model.save(tmp_path)
    again = Janus.from_pretrained(str(tmp_path), codec=Thirds()).eval()
    inputs = model.image_prompt(TEXTS)
    assert torch.equal(again.image_logits(again.image_prompt(TEXTS), IDS[:, :4]), model.image_logits(inputs, IDS[:, :4]))
    with pytest.raises(ValueError, match=r"tensors missing, such as model\.vqmodel"):
        Janus.from_pretrained(str(tmp_path))


def test_a_codec_may_stand_in_for_the_one_of_a_checkpoint(model, tmp_path):
    model.save(tmp_path)

    class Twenty(Thirds):
        num_codes = 20

    again = Janus.from_pretrained(str(tmp_path), codec=Twenty())
    assert torch.equal(again.image_head.vision_head.weight, model.image_head.vision_head.weight)


def test_statistics_of_pixels_go_with_the_weights(tmp_path):
    janus().save(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    said = json.loads(file.read_text())
    assert said["size"] == {"height": 8, "width": 8} and said["image_mean"] == [0.5] * 3
    file.write_text(json.dumps({**said, "image_mean": [0.25, 0.5, 0.75]}))
    again = Janus.from_pretrained(str(tmp_path))
    assert_close(again.normalise(torch.zeros(1, 3, 1, 1)).flatten(), torch.tensor([0.5, 0.0, -0.5]))
    again.save(tmp_path / "copy")
    assert torch.equal(Janus.from_pretrained(str(tmp_path / "copy")).image_mean, again.image_mean)
    file.write_text(json.dumps({**said, "size": {"height": 384, "width": 384}}))
    with pytest.raises(ValueError, match="image processor: size: found 384, expected 8, the vision tower's"):
        Janus.from_pretrained(str(tmp_path))


def test_files_that_are_no_weights_are_refused_in_one_line(model, tmp_path):
    model.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model.safetensors: found a Git-LFS pointer"):
        Janus.from_pretrained(str(tmp_path))
    weights.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="cut short"):
        Janus.from_pretrained(str(tmp_path))
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(ValueError, match=r"found a model of type 'llava', expected 'janus'; use umm_zoo.*LlavaBackbone"):
        Janus.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "multi_modality"}))
    with pytest.raises(ValueError, match=r"found Janus's original layout.*deepseek-community/Janus-Pro-1B") as refused:
        Janus.from_pretrained(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_output_layers_of_older_files_are_their_own(model, tmp_path):
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": "4.52.0"}))
    again = Janus.from_pretrained(str(tmp_path))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and not again.config.tie_word_embeddings


def test_numbers_of_another_release_are_asked_for(model, tmp_path):
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["text_config"]["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"found no 'text_config.rms_norm_eps'"):
        Janus.from_pretrained(str(tmp_path))
    stated = {"text_config": {"rms_norm_eps": 1e-3}}
    assert Janus.from_pretrained(str(tmp_path), config=stated).text_model.norm.variance_epsilon == 1e-3


# -- the releases' conversations ---------------------------------------------------------------------------------------------


def test_questions_are_the_official_processors(tmp_path):
    model = with_tokenizer(tmp_path)
    processor = JanusProcessor(
        JanusImageProcessorPil(size={"height": 8, "width": 8}, min_size=8),
        model.tokenizer,
        use_default_system_prompt=True,
        num_image_tokens=16,
    )
    turns = [user("<image>\nWhat is it? "), assistant("a red circle"), user("Where?")]
    asked = "<|User|>: <image_placeholder>\nWhat is it?\n\n<|Assistant|>: a red circle<\uff5cend\u2581of\u2581sentence\uff5c>"
    asked += "<|User|>: Where?\n\n<|Assistant|>:"
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    theirs = processor(text=[asked], images=[image])["input_ids"]
    assert torch.equal(model.embed([turns], torch.zeros(1, 3, 8, 8), [1], for_generation=True).token_ids, theirs)
    answered = model.embed([[*turns, assistant("above")]], torch.zeros(1, 3, 8, 8), [1])
    trained = answered.labels[0][answered.labels[0] != -100]
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert model.tokenizer.decode(trained) == f" a red circle{end} above{end}"


def test_prompts_for_images_are_the_official_processors(tmp_path):
    model = with_tokenizer(tmp_path)
    processor = JanusProcessor(JanusImageProcessorPil(), model.tokenizer, use_default_system_prompt=True, num_image_tokens=16)
    texts = [f"<|User|>: {text}\n\n<|Assistant|>:" for text in TEXTS]
    theirs = processor(text=texts, generation_mode="image", padding=True)
    inputs = model.image_prompt(TEXTS)
    assert torch.equal(inputs.token_ids, theirs["input_ids"])
    assert torch.equal(inputs.attention_mask, theirs["attention_mask"].bool())
    assert model.pad_id == 1026 and bool((model.unconditional(inputs).token_ids == 1026).any())


def test_roles_of_the_first_release_are_plain_text(tmp_path):
    source = tokenizer_folder(tmp_path)
    config = {**JANUS, "text_config": {**TEXT, "vocab_size": 1040}, "image_token_id": 1027}
    model = janus(config, tokenizer=source, template=JanusChat("User", "Assistant", system=""))
    inputs = model.embed([[user("Is it red?")]], None, [0], for_generation=True)
    assert torch.equal(inputs.token_ids[0], torch.tensor(model.tokenizer("User: Is it red?\n\nAssistant:")["input_ids"]))
    with pytest.raises(ValueError, match="config: found no 'image_token_id', expected that of <image_placeholder>"):
        janus({"text_config": TEXT, "vision_config": VISION, "vq_config": VQ}, tokenizer=source)


def test_a_named_language_model_gives_its_weights():
    shipped, row = "experiments/tiny/weights/llava", [[user("Is there a red circle?"), assistant("yes")]]
    parts = {"vision_config": {**VISION, "hidden_size": 24}, "vq_config": {"embed_dim": 8}}
    own = Janus.from_config(parts, Thirds(), template=QwenChat(None), language_model=shipped)
    theirs = LlavaBackbone.from_pretrained(shipped, template=QwenChat(None))
    loss, wanted = (model(model.embed(row, None, [0])).loss for model in (own, theirs))
    assert_close(loss, wanted)
    with pytest.raises(ValueError, match="text_config: found beside language_model"):
        Janus.from_config(JANUS, Thirds(), language_model=shipped)
