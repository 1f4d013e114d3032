"""SD3 against the library's own forward, its masks, its files, and the size of 3.5-large."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import SD3Transformer2DModel
from torch.testing import assert_close

from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.batch import Tokens
from umm_zoo.testing import check_block

CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 5,
    "out_channels": 5,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 14,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 6,
    "qk_norm": "rms_norm",
}


def network(**changes: object) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**{**CONFIG, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def inputs(length: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 5, 8, 4), (2,), (2, length, 14)]
    noisy, time, values = (torch.rand(shape, generator=generator) for shape in shapes)
    return noisy, time, values


@pytest.mark.parametrize("dual", [(), (0,)])
def test_without_a_mask_it_is_the_library_bit_for_bit(dual: tuple[int, ...]):
    pooled = torch.randn(7)
    noisy, time, values = inputs()
    with torch.no_grad():
        expected = network(dual_attention_layers=dual)(noisy, values, pooled.expand(2, -1), 1000 * time).sample
        found = StableDiffusion3(network(dual_attention_layers=dual), pooled)(noisy, time, Tokens(values))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_padding_is_not_seen():
    decoder = StableDiffusion3(network())
    noisy, time, values = inputs()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = decoder(noisy, time, Tokens(values, mask))
    assert_close(found[:1], decoder(noisy[:1], time[:1], Tokens(values[:1])), atol=1e-5, rtol=1e-5)
    assert_close(found[1:], decoder(noisy[1:], time[1:], Tokens(values[1:, :4])), atol=1e-5, rtol=1e-5)
    left = torch.cat([torch.randn(2, 3, 14), values], dim=1)
    shifted = decoder(noisy, time, Tokens(left, torch.tensor([[False] * 3 + [True] * 6] * 2)))
    assert_close(shifted, decoder(noisy, time, Tokens(values)), atol=1e-5, rtol=1e-5)


def test_contract():
    decoder = StableDiffusion3(network(), torch.randn(7))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    noisy, time, values = inputs()
    check_block(decoder, (noisy, time, Tokens(values, mask)), (2, 5, 8, 4))
    with pytest.raises(ValueError, match="multiples of 2"):
        decoder(noisy[..., :3], time, Tokens(values))
    with pytest.raises(ValueError, match="condition: found"):
        decoder(noisy, time, Tokens(values[..., :5]))


def test_the_constant_is_that_of_the_empty_string_under_both_text_encoders(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from umm_zoo.backbones.pooled import pooled_of_nothing
    from umm_zoo.backbones.tokenizer import load_tokenizer

    tokenizer, wanted = load_tokenizer(), []
    for suffix, width in (("", 8), ("_2", 12)):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=width,
            max_position_embeddings=5,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=0,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoder = CLIPTextModelWithProjection(config).eval()
        encoder.save_pretrained(tmp_path / f"text_encoder{suffix}")
        tokenizer.save_pretrained(tmp_path / f"tokenizer{suffix}")
        ids = tokenizer("", padding="max_length", max_length=5, return_tensors="pt").input_ids
        wanted.append(encoder(ids).text_embeds[0].detach())
    assert_close(pooled_of_nothing(tmp_path, StableDiffusion3.pooled_parts), torch.cat(wanted))
