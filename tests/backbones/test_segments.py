"""Attention of towers in segments, against the library's own, which takes one segment after another."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from library_checkpoints import wrapped
from torch.testing import assert_close

from tests.backbones.vlm_parts import QWEN, qwen
from umm_zoo.backbones import segments as under_test
from umm_zoo.backbones.decoder_attention import SDPA
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.segments import SEGMENTED, Segments, attend, has_flash, segments

#: Pixels of images whose windows of 16 are ragged at right and lower borders, each in its own way; two are of one size.
RAGGED = [(24, 40), (56, 36), (32, 32), (24, 40), (8, 100)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vlm():
    return qwen()


def features(vlm, sizes, attention):
    """Image tokens under that attention, and the gradients of the patch embedding."""
    tower = vlm.parts()["vision_tower"]
    config = next(part.config for part in tower.modules() if hasattr(part, "qkv"))
    before, config._attn_implementation = config._attn_implementation, attention
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed, size in enumerate(sizes)]
    made = torch.cat(vlm.encode_images(images))
    config._attn_implementation = before
    weight = next(tower.parameters())
    return made, torch.autograd.grad(made.square().sum(), weight)[0], before


@pytest.mark.parametrize("sizes", [[(32, 32)] * 3, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_tokens_and_gradients_are_the_librarys(kind, sizes):
    vlm = wrapped(kind)
    made, gradient, own = features(vlm, sizes, SEGMENTED)
    expected, its_gradient, _ = features(vlm, sizes, "sdpa")
    assert own == SEGMENTED
    assert_close(made, expected, rtol=0, atol=1e-5)
    assert_close(gradient, its_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sizes", "calls"), [([(32, 32)] * 3, 2), (RAGGED, 3 + 4)])
def test_one_call_per_layer_and_length(vlm, sizes, calls, monkeypatch):
    seen, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(under_test.F, "scaled_dot_product_attention", lambda *a, **k: seen.append(0) or real(*a, **k))
    vlm.encode_images([torch.zeros(3, *size) for size in sizes])
    assert len(seen) == calls  # windows of 16, 8 and 4 patches; images of four sizes


def test_attention_of_the_tower_is_chosen_apart():
    own = Qwen25VL.from_config(QWEN, tower_attention="eager")
    assert own.model.model.visual.config._attn_implementation == "eager"
    assert own.language_stack(copied=False)._config._attn_implementation == SDPA


def test_no_flash_on_a_cpu_nor_in_single_precision():
    assert not has_flash(CPU, torch.bfloat16, 16) and not has_flash(torch.device("cuda"), torch.bfloat16, 20)


def test_a_flash_kernel_takes_all_segments_at_once(monkeypatch):
    lengths = [3, 1, 4]
    own, calls = segments(lengths, torch.tensor([7, 0, 1, 5, 2, 6, 4, 3]), CPU, flash=True), []

    def kernel(query, key, value, borders, same, longest, _, softmax_scale, causal):
        calls.append((borders.tolist(), longest, causal))
        parts = zip(*(part.split(borders.diff().tolist()) for part in (query, key, value)), strict=True)
        heads = ([part.transpose(0, 1) for part in own] for own in parts)
        return torch.cat([F.scaled_dot_product_attention(*own, scale=softmax_scale).transpose(0, 1) for own in heads])

    monkeypatch.setattr(under_test, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=kernel))
    query, key, value = torch.randn(3, 1, 2, 8, 16).bfloat16().unbind(0)
    made, _ = attend(None, query, key, value, cu_seq_lens_q=own, scaling=0.3)
    rows = Segments(own.lengths, own.order, own.back)
    assert_close(made, attend(None, query, key, value, cu_seq_lens_q=rows, scaling=0.3)[0], rtol=0, atol=1e-2)
    assert calls == [([0, 3, 4, 8], 4, False)]


def test_borders_of_the_library_are_segments_too():
    query, key, value = torch.randn(3, 1, 2, 6, 4).unbind(0)
    made, _ = attend(None, query, key, value, cu_seq_lens_q=torch.tensor([0, 2, 6]))
    last = [part[:, :, 2:] for part in (query, key, value)]
    assert_close(made[:, 2:], F.scaled_dot_product_attention(*last).transpose(1, 2))
