"""Checkpoints that the library wrote, in our wrapper and in the library's own model and processor."""

import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from library_checkpoints import checkpoint, library, wrapped, write
from PIL import Image
from torch.testing import assert_close

from tests.backbones.vlm_parts import QWEN
from umm_zoo.backbones.generation import take_rows
from umm_zoo.backbones.preparation import WholeRows
from umm_zoo.backbones.pretrained_vlm import PretrainedVLM
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.templates import IGNORE, VicunaV1
from umm_zoo.backbones.vlm_families import VLM_FAMILIES
from umm_zoo.backbones.vlm_uses import PROVEN, proven
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build
from umm_zoo.training.trial import try_part

SIZES = [(20, 30), (9, 12), (33, 17)]  # height and width
PIXELS = [np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8) for seed, size in enumerate(SIZES)]
IMAGES = [torch.from_numpy(own).permute(2, 0, 1) / 127.5 - 1 for own in PIXELS]
COUNTS = [1, 2, 0]
PROMPTS = [
    [{"role": "user", "text": "<image>What colour is it?"}],
    [{"role": "user", "text": " See<image>and<image>the other!"}],
    [{"role": "user", "text": "Is it?"}, {"role": "assistant", "text": "no"}, {"role": "user", "text": "Why?"}],
]
ANSWERS = ["red", "the second is green", "yes"]
ROWS = [[*turns, {"role": "assistant", "text": answer}] for turns, answer in zip(PROMPTS, ANSWERS, strict=True)]


@pytest.fixture(scope="module", params=list(PROVEN))
def loaded(request):
    folder = checkpoint(request.param)
    return request.param, folder, *library(folder), wrapped(request.param)


def theirs(processor, rows, **settings):
    """The rows as the library's processor makes them."""
    left, conversations = iter(PIXELS), []
    for turns in rows:
        conversations.append([])
        for turn in turns:
            parts = turn["text"].split("<image>")
            content = [{"type": "text", "text": parts[0]}] if parts[0] else []
            for part in parts[1:]:
                content += [
                    {"type": "image", "image": Image.fromarray(next(left))},
                    *([{"type": "text", "text": part}] if part else []),
                ]
            conversations[-1].append({"role": turn["role"], "content": content})
    given = {"padding": True, "return_mm_token_type_ids": True, **settings.pop("kwargs", {})}
    made = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=given, **settings
    )
    unused = [name for name in made if name == "mm_token_type_ids" and "image_grid_thw" not in made]
    return {name: value for name, value in made.items() if name not in unused}


def test_logits_and_loss_are_the_librarys(loaded):
    kind, _, model, processor, vlm = loaded
    inputs = vlm.embed(ROWS, IMAGES, COUNTS)
    ids = inputs.token_ids
    given = theirs(processor, ROWS, kwargs={"padding_side": "right"})
    if "llava" not in kind or kind == "llava_onevision":  # Vicuna's template closes no answer
        assert given["input_ids"].equal(ids) and given["attention_mask"].bool().equal(inputs.attention_mask)
    else:
        given |= {"input_ids": ids, "attention_mask": inputs.attention_mask.long()}
    with torch.no_grad():
        expected, output = model(**given).logits, vlm(inputs)
    real = inputs.attention_mask
    assert_close(vlm.lm_head(output.hidden)[real], expected[real], rtol=0, atol=1e-5)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), inputs.labels[:, 1:].flatten(), ignore_index=IGNORE)
    assert_close(output.loss, loss, rtol=0, atol=1e-5)
    trained = [vlm.tokenizer.decode(row[row != IGNORE]).replace(" ", "") for row in inputs.labels]  # some begin with a blank
    end = vlm.template.end
    assert trained == [f"{ANSWERS[0]}{end}", f"thesecondisgreen{end}", f"no{end}{ANSWERS[2]}{end}"]


def test_greedy_answers_are_the_librarys(loaded):
    _, _, model, processor, vlm = loaded
    prompts = PROMPTS[:2]
    given = theirs(processor, prompts, add_generation_prompt=True, kwargs={"padding_side": "left"})
    inputs = vlm.embed(prompts, IMAGES, COUNTS[:2], for_generation=True)
    assert inputs.token_ids.equal(given["input_ids"])
    expected = model.generate(**given, max_new_tokens=7, do_sample=False)[:, inputs.token_ids.shape[1] :]
    own = vlm.sample_from(inputs, 1, max_new_tokens=7, temperature=0.0)
    length = own.tokens.shape[1]
    assert own.tokens.tolist() == expected[:, :length].tolist() and len(set(own.texts)) == 2
    scores, mask = vlm.log_probs(vlm.with_answers(inputs, own.tokens, own.mask))
    assert_close(scores[mask], own.log_probs[own.mask], rtol=0, atol=1e-5)


def test_images_that_a_worker_has_processed_are_those_of_the_step(loaded, monkeypatch):
    vlm, images = loaded[-1], [image.clone() for image in IMAGES]
    made = pickle.dumps(vlm.preparation(WholeRows(answers=False)))
    outlines = [torch.empty_like(image, device="meta") for image in IMAGES]
    expected = vlm.embed(ROWS, images, COUNTS)
    prepared = pickle.loads(made)(Batch(["a", "b", "c"], ROWS, outlines, COUNTS), PIXELS)
    prepared.images.keep_for(images, COUNTS)
    monkeypatch.setattr("umm_zoo.backbones.pretrained_vlm.processed", None)
    found = vlm.embed(ROWS, images, COUNTS)
    assert found.embeddings.equal(expected.embeddings) and len(made) < 200_000
    assert [vlm.known_rows.get(key).ids.tolist() for key in prepared.rows] == [row.ids.tolist() for row in prepared.rows.values()]


def test_answers_behind_a_prompt_that_is_run_once_are_scored_as_in_whole_rows(loaded):
    vlm = loaded[-1]
    inputs, owners = vlm.embed(PROMPTS[:2], IMAGES, COUNTS[:2], for_generation=True), torch.tensor([1, 0, 1])
    tokens = vlm.sample_from(inputs, 2, max_new_tokens=5).tokens[:3]
    mask = torch.arange(tokens.shape[1]) < torch.tensor([[5], [3], [1]])
    scores, _ = vlm.log_probs(vlm.with_answers(take_rows(inputs, owners), tokens, mask), 0.7)
    assert_close(vlm.answer_log_probs(inputs, tokens, mask, owners, 0.7), scores[:, -tokens.shape[1] :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("for_generation", [False, True])
def test_prefix_and_continuation_are_one_pass(loaded, for_generation):
    vlm = loaded[-1]
    prompts = [PROMPTS[1], PROMPTS[2][:1]]
    prefix = vlm.prefix(vlm.embed(prompts, IMAGES[1:], [2, 0], for_generation))
    tokens = torch.tensor([[15, 16, 17], [18, 19, 20]])
    causal = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    stack = vlm.language_stack(copied=True)
    states = stack(vlm.text_model.embed_tokens(tokens), prefix, prefix.text_positions(3), causal)
    for row, (images, count) in enumerate([(IMAGES[1:], 2), (None, 0)]):
        alone = vlm.embed(prompts[row : row + 1], images, [count], for_generation)
        whole = vlm(vlm.with_answers(alone, tokens[row : row + 1], torch.ones(1, 3, dtype=torch.bool))).hidden[0]
        assert_close(states[row], whole[-3:], rtol=0, atol=1e-5)
        assert_close(prefix.last_hidden[row], whole[-4], rtol=0, atol=1e-5)


def test_parts_hold_each_parameter_once_and_get_gradients(loaded):
    vlm = loaded[-1]
    held = [parameter for part in vlm.parts().values() for parameter in part.parameters()]
    assert len(held) == len(set(held)) and set(held) == set(vlm.parameters())
    vlm.zero_grad()
    vlm.train()
    vlm(vlm.embed(ROWS, IMAGES, COUNTS)).loss.backward()
    lacking = [name for name, own in vlm.named_parameters() if own.requires_grad and own.grad is None]
    vlm.eval()
    assert not lacking


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llava", {"text_config": {"model_type": "mistral", "sliding_window": 6}}),  # a window without a list of layers
        ("llava", {"text_config": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 6}}),  # no attention but eager
        ("internvl", {"vision_feature_layer": -2}),  # layers that no loss reaches
    ],
)
def test_odd_relatives_are_as_the_library_runs_them(kind, change, tmp_path):
    folder = write(tmp_path, kind, **change)
    odd = (kind, folder, *library(folder), PretrainedVLM.from_pretrained(str(folder)).eval())
    test_logits_and_loss_are_the_librarys(odd)
    test_prefix_and_continuation_are_one_pass(odd, True)
    test_parts_hold_each_parameter_once_and_get_gradients(odd)


def test_tokens_of_many_sizes_are_as_many_as_features(loaded):
    vlm = loaded[-1]
    for height, width in [(8, 8), (7, 50), (64, 9), (31, 47), (16, 17), (100, 60)]:
        image = torch.zeros(3, height, width)
        for count in (1, 2):
            vlm.image_features([image] * count, [count])  # refuses other numbers
        grid = vlm.image_grid(height, width)
        assert grid.num_cells == sum(vlm.image_layout(height, width, 1).runs)
        assert vlm.forms_grid(height, width) or grid.h == 1


@pytest.mark.parametrize("kind", ["qwen3_vl", "smolvlm"])
def test_saved_is_loaded_again_here_and_there(kind, tmp_path):
    vlm = wrapped(kind)
    vlm.save(tmp_path)
    again = PretrainedVLM.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        assert again(again.embed(ROWS, IMAGES, COUNTS)).loss == vlm(vlm.embed(ROWS, IMAGES, COUNTS)).loss
    library(tmp_path)


def test_the_list_of_proven_uses_is_whole():
    assert list(PROVEN) == list(VLM_FAMILIES) == proven("same") == proven("prefix")


def test_on_the_meta_device_sizes_are_known_and_nothing_is_run(loaded):
    _, folder, _, _, vlm = loaded
    node = {"_target_": "umm_zoo.backbones.pretrained_vlm.PretrainedVLM.from_pretrained", "source": str(folder)}
    with torch.device("meta"):
        shape = build(node)
    assert shape.image_grid(33, 17) == vlm.image_grid(33, 17) and shape.device.type == "meta"
    assert {name: own.shape for name, own in shape.state_dict().items()} == {n: own.shape for n, own in vlm.state_dict().items()}
    try_part(shape, [torch.empty(1, 3, 20, 30, device="meta")] * 2, "vlm", "e.yaml")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_folder_of_another_family_is_refused_by_its_name(device):
    with torch.device(device):
        with pytest.raises(ValueError, match=r"found a model of type 'qwen3_vl', expected 'qwen2_5_vl'; use .*PretrainedVLM$"):
            Qwen25VL.from_pretrained(str(checkpoint("qwen3_vl")), QWEN)
        with pytest.raises(UserError, match=r"found a model of type 'clip', expected one of .*; use .*CLIPFeatures"):
            PretrainedVLM.from_pretrained("experiments/tiny/weights/clip")


def test_gradient_checkpointing_changes_no_gradient():
    plain = wrapped("qwen3_vl").train()
    other = PretrainedVLM.from_pretrained(str(checkpoint("qwen3_vl")), gradient_checkpointing=True).train()
    first, second = (
        torch.autograd.grad(own(own.embed(ROWS, IMAGES, COUNTS)).loss, list(own.parts()["vision_tower"].parameters()))
        for own in (plain, other)
    )
    assert_close(second, first, rtol=0, atol=1e-6)


def test_half_precision_keeps_the_frequencies():
    vlm = wrapped("gemma3").to(torch.bfloat16)
    kinds = {name.rsplit(".", 1)[1]: own.dtype for name, own in vlm.named_buffers() if "inv_freq" in name}
    assert len(kinds) == 4 and set(kinds.values()) == {torch.float32}
    assert vlm(vlm.embed(ROWS, IMAGES, COUNTS)).loss.isfinite()


def test_settings_of_the_image_processor():
    folder = str(checkpoint("qwen2_vl"))
    assert PretrainedVLM.from_pretrained(folder, image_processor={"max_pixels": 400}).image_grid(99, 99) == (2, 2)
    with pytest.raises(
        UserError, match=r"found 'max_pixel', expected a setting of Qwen2VLImageProcessorPil; did you mean 'max_pixels'"
    ):
        PretrainedVLM.from_pretrained(folder, image_processor={"max_pixel": 400})


def test_what_a_folder_lacks_is_said(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint("llava") / name, tmp_path)
    with pytest.raises(FileNotFoundError, match="image processor"):
        PretrainedVLM.from_pretrained(str(tmp_path))
    shutil.copy(checkpoint("llava") / "preprocessor_config.json", tmp_path)
    with pytest.raises(UserError, match=r"no chat template, expected chat_template.jinja beside the weights; state one"):
        PretrainedVLM.from_pretrained(str(tmp_path))
    vlm = PretrainedVLM.from_pretrained(str(tmp_path), template=VicunaV1(end="<|im_end|>"))
    assert vlm.generate(PROMPTS[:1], IMAGES[:1], [1], 3)
