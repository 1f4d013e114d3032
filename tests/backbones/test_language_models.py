"""Decoder-only language models of the library in a LLaVA: their own logits and answers, whatever their parts are called."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.tokenizer import load_tokenizer
from umm_zoo.errors import UserError

TOWER = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
SIZES = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
FEW = {"num_key_value_heads": 1, "head_dim": 12}
SPECIAL = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3}
KINDS = {
    "llama": SIZES,
    "mistral": SIZES | FEW,
    "qwen2": SIZES | {"num_key_value_heads": 1},
    "qwen3": SIZES | FEW,
    "phi3": SIZES | {"num_key_value_heads": 1},
    "gemma2": SIZES | FEW | {"query_pre_attn_scalar": 12, "final_logit_softcapping": 20.0},
    "gemma3_text": SIZES | FEW,
    "granite": SIZES | {"num_key_value_heads": 1, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gpt_neox": SIZES,
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 40, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
    "opt": {"hidden_size": 24, "ffn_dim": 28, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 24}
    | {"max_position_embeddings": 40, "dropout": 0},
}
TURNS = [[{"role": "user", "text": said}, {"role": "assistant", "text": "b"}] for said in ("Who is it?", "What")]
IMAGE = [{"role": "user", "text": "<image>?"}, {"role": "assistant", "text": "red"}]


@cache
def made(kind: str) -> tuple[LlavaBackbone, torch.nn.Module]:
    """A LLaVA around a language model of the library, and that language model."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SPECIAL, **KINDS[kind])).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases and gains too
    folder = mkdtemp()
    theirs.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return LlavaBackbone.from_parts(TOWER, folder, max_length=40, dtype="float32").eval(), theirs


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_of_padded_rows_are_those_of_the_library(kind: str) -> None:
    own, theirs = made(kind)
    inputs = own.embed(TURNS, None, [0, 0])
    logits = own.lm_head(own.run_whole(inputs))
    expected = theirs(input_ids=inputs.token_ids, attention_mask=inputs.attention_mask).logits
    real = inputs.attention_mask.bool()
    assert not real.all() and torch.allclose(logits[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_the_library(kind: str) -> None:
    own, theirs = made(kind)
    turns = [TURNS[1][:1]]
    inputs = own.embed(turns, None, [0], for_generation=True)
    whole = theirs.generate(inputs.token_ids, max_new_tokens=5, do_sample=False, eos_token_id=own.stop_ids, pad_token_id=0)
    answer = own.tokenizer.decode(whole[0, inputs.token_ids.shape[1] :], skip_special_tokens=True).strip()
    assert own.generate(turns, None, [0], 5) == [answer]


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "opt"])
def test_what_was_saved_is_the_same_again_and_recomputed_layers_give_the_same_gradients(kind: str, tmp_path: Path) -> None:
    own, _ = made(kind)
    own.save(tmp_path)
    again = LlavaBackbone.from_pretrained(str(tmp_path), max_length=40, gradient_checkpointing=True).train()
    images, found = torch.rand(1, 3, 8, 8), []
    for model in (own, again):
        model.zero_grad()
        loss = model(model.embed([IMAGE], images, [1])).loss
        loss.backward()
        found.append((loss, model.text_model.get_input_embeddings().weight.grad, model.projector.linear_1.weight.grad))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True)) and found[0][1].any()


def test_rows_longer_than_the_learned_positions_are_refused() -> None:
    with pytest.raises(UserError, match="max_length: found 41, expected at most the 40 positions that this gpt2 has learned"):
        LlavaBackbone.from_parts(TOWER, {"model_type": "gpt2", **KINDS["gpt2"]}, max_length=41)


@pytest.mark.parametrize(
    ("kind", "sizes", "line"),
    [
        ("bloom", {"hidden_size": 24, "n_layer": 1, "n_head": 2}, "found a model of type 'bloom', expected a decoder that takes"),
        ("opt", KINDS["opt"] | {"word_embed_proj_dim": 12}, "found embeddings of 12 and states of 24, expected one width"),
    ],
)
def test_a_decoder_that_does_not_fit_is_one_line(kind: str, sizes: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        LlavaBackbone.from_parts(TOWER, {"model_type": kind, **sizes}, max_length=40)
