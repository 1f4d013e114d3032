"""The language model's attention as this package gives it to the library."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tests.backbones.vlm_parts import qwen
from umm_zoo.backbones.decoder_attention import SDPA, attend, make_mask, said, with_shared_keys


def heads(count, length):
    return torch.randn(2, count, length, 8, generator=torch.Generator().manual_seed(count * length))


@pytest.mark.parametrize("masked", [False, True])
def test_shared_keys_are_as_repeated_ones(masked, monkeypatch):
    seen, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *own, **k: seen.append(own[1].shape[1]) or real(*own, **k))
    query, key, value = heads(6, 5), heads(2, 7), heads(2, 7) + 1
    mask = torch.rand(2, 1, 5, 7) > 0.3 if masked else None
    made = with_shared_keys(query, key, value, mask)
    assert seen == [2]
    assert_close(made, real(query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), mask))


@pytest.mark.parametrize("queries", [1, 4, 7])
def test_it_is_the_librarys(queries):
    class Module:
        num_key_value_groups, is_causal = 3, True

    given = Module(), heads(6, queries), heads(2, 7), heads(2, 7) + 1, None
    assert_close(attend(*given, scaling=0.2)[0], sdpa_attention_forward(*given, scaling=0.2)[0])


@pytest.mark.parametrize(("padded", "whole"), [(True, True), (False, False)])
def test_who_says_whether_rows_are_padded_decides_whether_there_is_a_mask(padded, whole):
    rows = torch.ones(2, 4, dtype=torch.bool)
    with said(padded):
        made = make_mask(2, 4, 4, attention_mask=rows)
    assert (made is not None) == whole
    assert make_mask(2, 4, 4, attention_mask=rows) is None  # nobody says: it is looked at
    assert not whole or made.equal(sdpa_mask(2, 4, 4, attention_mask=rows, allow_is_causal_skip=False))


def test_states_are_those_of_the_librarys_own_attention():
    vlm = qwen().eval()
    rows = [[{"role": "user", "text": "Hi"}], [{"role": "user", "text": "<image> What colour is the circle?"}]]
    inputs = vlm.embed(rows, torch.rand(1, 3, 32, 32), [0, 1])
    states = vlm(inputs).hidden
    assert vlm.text_model.config._attn_implementation == SDPA
    vlm.text_model.config._attn_implementation = "sdpa"
    assert_close(vlm(inputs).hidden[inputs.attention_mask], states[inputs.attention_mask], rtol=0, atol=1e-5)


def test_keys_of_a_prompt_are_the_same_without_what_only_its_answers_need():
    vlm, ran = qwen().eval(), []
    rows = [[{"role": "user", "text": "Hi"}], [{"role": "user", "text": "<image> What colour is the circle?"}]]
    inputs = vlm.embed(rows, torch.rand(1, 3, 32, 32), [0, 1], for_generation=True)
    last = vlm.text_model.layers[-1]
    last.mlp.down_proj.register_forward_hook(lambda *_: ran.append(1))
    whole, keys = vlm.prefix(inputs), vlm.keys(inputs)
    assert len(ran) == 1 and keys.last_hidden.isnan().all()
    for one, other in zip(whole.cache.layers, keys.cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert torch.equal(vlm.prefix(inputs).last_hidden, whole.last_hidden)  # all is as it was
