"""Features injected into a diffusion transformer: nothing at scale 0, and one attention more, worked out by hand, at others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from umm_zoo.backbones.feature_injection import FeatureInjection
from umm_zoo.backbones.flux import Flux
from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.batch import Tokens
from umm_zoo.blocks.resampler import PerceiverResampler

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
from uae_parts import DECODER, lively


def decoder() -> StableDiffusion3:
    torch.manual_seed(0)
    made = StableDiffusion3.from_config({**DECODER, "qk_norm": "rms_norm"})
    return lively(made).eval()  # type: ignore[return-value]


def adapter(scale: float = 0.5, zero_values: bool = False) -> FeatureInjection:
    torch.manual_seed(1)
    return FeatureInjection(PerceiverResampler(7, 20, 12, num_queries=3, depth=2, num_heads=2, head_dim=4), scale, zero_values)


def inputs() -> tuple[Tensor, Tensor, Tokens, Tensor]:
    torch.manual_seed(2)
    return torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.8]), Tokens(torch.randn(2, 5, 20)), torch.randn(2, 9, 7)


@torch.no_grad()
def test_without_features_at_scale_0_and_with_values_of_zero_nothing_changes() -> None:
    noisy, time, condition, features = inputs()
    plain = decoder()(noisy, time, condition)
    for scale, zero, given in ((0.5, False, None), (0.0, False, features), (0.5, True, features)):
        own, beside = decoder(), adapter(scale, zero)
        beside.attach(own)
        with beside.features(given):
            assert torch.equal(own(noisy, time, condition), plain)
    own, beside = decoder(), adapter()
    beside.attach(own)
    with beside.features(features):
        changed = own(noisy, time, condition)
    assert not torch.allclose(changed, plain, atol=1e-3) and torch.equal(own(noisy, time, condition), plain)


@torch.no_grad()
def test_every_attention_gets_a_pair_and_its_outcome_is_added_before_the_output_layer() -> None:
    noisy, time, condition, features = inputs()
    own, beside, seen = decoder(), adapter(), {}
    attention = own.model.transformer_blocks[0].attn
    hooks = [
        attention.to_q.register_forward_hook(lambda _, i, o: seen.update(queries=o)),
        attention.to_out[0].register_forward_pre_hook(lambda _, i: seen.update(before=i[0])),
    ]
    own(noisy, time, condition)
    before = seen["before"]
    for hook in hooks:
        hook.remove()
    beside.attach(own)
    assert sorted(beside.layers) == [f"transformer_blocks/{k}/attn" for k in range(2)]
    attention.to_out[0].register_forward_pre_hook(lambda _, i: seen.update(after=i[0]))
    with beside.features(features):
        own(noisy, time, condition)
    tokens, pair = beside.resampler(features), beside.layers["transformer_blocks/0/attn"]
    keys, values = pair.faq_adapter_to_k(tokens), pair.faq_adapter_to_v(tokens)
    expected = []
    for head in range(2):
        some = slice(8 * head, 8 * head + 8)
        q = seen["queries"][..., some]
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.norm_q.weight
        k = keys[..., some] / (keys[..., some].square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected.append((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ values[..., some])
    assert_close(seen["after"], before + 0.5 * torch.cat(expected, -1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_single_blocks_whose_attention_has_no_output_layer_get_a_pair_too() -> None:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "patch_size": 1, "num_layers": 1, "num_single_layers": 2, "axes_dims_rope": [2, 2, 4]}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 20, "pooled_projection_dim": 6}
    own = Flux.from_config({**sizes, **heads, "guidance_embeds": False}).eval()
    lively(own)
    beside, (_, time, condition, features) = adapter(), inputs()
    noisy = torch.randn(2, own.latent_channels, 4, 4)
    plain = own(noisy, time, condition)
    beside.attach(own)
    assert sorted(beside.layers) == [
        "single_transformer_blocks/0/attn",
        "single_transformer_blocks/1/attn",
        "transformer_blocks/0/attn",
    ]
    for name, pair in beside.layers.items():  # of the last alone
        if not name.startswith("single_transformer_blocks/1"):
            nn.init.zeros_(pair.faq_adapter_to_v.weight)
            nn.init.zeros_(pair.faq_adapter_to_v.bias)
    assert torch.equal(own(noisy, time, condition), plain)
    with beside.features(features):
        assert not torch.allclose(own(noisy, time, condition), plain, atol=1e-3)


def test_only_the_adapter_learns_and_each_row_sees_its_own_features() -> None:
    noisy, time, condition, features = inputs()
    own, beside = decoder().requires_grad_(False), adapter()
    beside.attach(own)
    with beside.features(features):
        both = own(noisy, time, condition)
    both[0].sum().backward()
    assert all(p.grad is not None for p in beside.parameters())
    with torch.no_grad(), beside.features(features[1:]):
        assert_close(own(noisy[1:], time[1:], Tokens(condition.values[1:])), both[1:].detach(), atol=1e-5, rtol=1e-4)


def test_it_is_attached_once_and_to_attentions_alone() -> None:
    own, beside = decoder(), adapter()
    beside.attach(own)
    with pytest.raises(ValueError, match="attached already"):
        beside.attach(own)
    own.model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="without such attentions"):
        adapter().attach(own)


@torch.no_grad()
def test_a_resampler_makes_a_fixed_number_of_tokens_of_any_number() -> None:
    block = adapter().resampler
    tokens = torch.randn(2, 9, 7)
    assert block(tokens).shape == (2, 3, 20) and block(tokens[:, :4]).shape == (2, 3, 20)
    assert_close(block(tokens[:, torch.randperm(9)]), block(tokens), atol=1e-5, rtol=1e-4)  # it knows no places
    assert_close(block(tokens[1:]), block(tokens)[1:], atol=1e-5, rtol=1e-4)
