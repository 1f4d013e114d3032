"""Checkpoints that the library wrote, in our wrapper and in the library's own model and processor."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from library_checkpoints import checkpoint, library, wrapped
from PIL import Image
from torch.testing import assert_close

from umm_zoo.backbones.pretrained_vlm import PretrainedVLM
from umm_zoo.backbones.templates import IGNORE
from umm_zoo.backbones.vlm_uses import PROVEN, proven

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


def test_tokens_of_many_sizes_are_as_many_as_features(loaded):
    vlm = loaded[-1]
    for height, width in [(8, 8), (7, 50), (64, 9), (31, 47), (16, 17), (100, 60)]:
        image = torch.zeros(3, height, width)
        for count in (1, 2):
            vlm.image_features([image] * count, [count])  # refuses other numbers
        grid = vlm.image_grid(height, width)
        assert grid.num_cells == sum(vlm.image_layout(height, width, 1).runs)
        assert vlm.forms_grid(height, width) or grid.h == 1


def test_saved_is_loaded_again_here_and_there(loaded, tmp_path):
    vlm = loaded[-1]
    vlm.save(tmp_path)
    again = PretrainedVLM.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        assert again(again.embed(ROWS, IMAGES, COUNTS)).loss == vlm(vlm.embed(ROWS, IMAGES, COUNTS)).loss
    library(tmp_path)


def test_the_list_of_proven_uses_is_whole():
    assert set(proven("logits")) == set(PROVEN)
