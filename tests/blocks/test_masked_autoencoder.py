"""Masked encoder and decoder: rows alone and among others, hidden tokens, other grids, the names of MAR's release."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.masked_autoencoder import MaskedDecoder, MaskedEncoder, PromptedDecoder, parts_of_mar, positions_of
from umm_zoo.errors import UserError
from umm_zoo.testing import check_block

HIDDEN = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [0] * 9]).bool()


def encoder(**more: float) -> MaskedEncoder:
    torch.manual_seed(0)
    return MaskedEncoder(channels=5, side=3, width=12, depth=2, heads=3, num_buffers=2, **more).eval()


def decoder() -> MaskedDecoder:
    torch.manual_seed(1)
    return MaskedDecoder(encoder_width=12, side=3, width=8, depth=2, heads=2, num_buffers=2).eval()


def test_blocks_keep_their_contracts() -> None:
    tokens = torch.randn(4, 9, 5)
    check_block(encoder(), (tokens, HIDDEN), output_shape=(4, 11, 12))
    with torch.no_grad():
        encoded = encoder()(tokens, HIDDEN)
    check_block(decoder(), (encoded,), output_shape=(4, 9, 8))
    prompted = PromptedDecoder(7, encoder_width=12, side=3, width=8, depth=1, heads=2, num_buffers=2)
    prompt = Tokens(torch.randn(4, 6, 7), torch.rand(4, 6) < 0.5)
    check_block(prompted, (encoded, prompt), output_shape=(4, 9, 8))


def test_a_row_does_not_depend_on_how_many_tokens_others_hide() -> None:
    tokens, reader, writer = torch.randn(4, 9, 5), encoder(), decoder()
    together = writer(reader(tokens, HIDDEN))
    for row in range(4):
        assert_close(writer(reader(tokens[[row]], HIDDEN[[row]])), together[[row]], atol=1e-5, rtol=0)


def test_hidden_tokens_are_not_looked_at() -> None:
    tokens, reader, writer = torch.randn(4, 9, 5), encoder(), decoder()
    others = torch.where(HIDDEN[..., None], torch.full_like(tokens, torch.nan), tokens)
    found, expected = reader(others.nan_to_num(9.0), HIDDEN), reader(tokens, HIDDEN)
    assert_close(writer(found), writer(expected))


def test_visible_tokens_stand_behind_the_buffers_in_raster_order() -> None:
    found = encoder()(torch.randn(4, 9, 5), HIDDEN)
    assert found.places[0, :5].tolist() == [1, 4, 5, 7, 8] and found.places[1, 0] == 0
    assert found.counted.sum(1).tolist() == [7, 3, 2, 11]


def test_buffers_without_any_visible_token_are_the_same_for_every_image() -> None:
    found = encoder()(torch.randn(2, 9, 5), torch.ones(2, 9, dtype=torch.bool))
    assert found.values.shape == (2, 2, 12) and found.mask is None
    assert_close(found.values[0], found.values[1])
    assert not torch.equal(found.values[0, 0], found.values[0, 1])  # their positions differ


def test_positions_of_another_grid_are_resized_and_those_of_buffers_kept() -> None:
    ramp = torch.arange(4.0).repeat(4)  # the column
    table = torch.cat([torch.full((1, 2, 1), 7.0), ramp.view(1, 16, 1)], dim=1)
    found = positions_of(table, 2, 4, Grid(2, 2))[0, :, 0]
    assert_close(found, torch.tensor([7.0, 7.0, 0.5, 2.5, 0.5, 2.5]))
    assert encoder()(torch.randn(1, 8, 5), torch.zeros(1, 8, dtype=torch.bool), Grid(2, 4)).values.shape == (1, 10, 12)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    own, tokens = encoder(dropout=0.5), torch.randn(1, 9, 5)
    shown = torch.zeros(1, 9, dtype=torch.bool)
    assert torch.equal(own(tokens, shown).values, own(tokens, shown).values)
    own.train()
    assert not torch.equal(own(tokens, shown).values, own(tokens, shown).values)


def test_a_prompt_reaches_the_control_alone_and_its_padding_nothing() -> None:
    states, encoded = torch.randn(4, 6, 7), encoder()(torch.randn(4, 9, 5), HIDDEN)
    mask = torch.arange(6).expand(4, 6) < 4
    own = PromptedDecoder(7, encoder_width=12, side=3, width=8, depth=1, heads=2, num_buffers=2).eval()
    other = states.clone()
    other[:, 5] = 3.0
    assert_close(own(encoded, Tokens(states, mask)), own(encoded, Tokens(other, mask)))
    other[:, 1] = 3.0
    assert not torch.allclose(own(encoded, Tokens(states, mask)), own(encoded, Tokens(other, mask)))
    assert_close(decoder()(encoded, Tokens(states, mask)), decoder()(encoded))


def test_names_are_those_of_the_release() -> None:
    layer = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    names = ["z_proj", "z_proj_ln", "encoder_norm", *(f"encoder_blocks.{place}.{own}" for place in (0, 1) for own in layer)]
    expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} | {"fake_latent", "encoder_pos_embed_learned"}
    assert set(encoder().state_dict()) == expected
    whole = {**encoder().state_dict(), **decoder().state_dict(), "class_emb.weight": torch.zeros(3, 12)}
    parts = parts_of_mar({**whole, "diffloss.net.cond_embed.bias": torch.zeros(2)})
    assert {name: set(own) for name, own in parts.items()} == {
        "encoder": expected,
        "decoder": set(decoder().state_dict()),
        "head": {"cond_embed.bias"},
    }
    with pytest.raises(UserError, match="vision_tower"):
        parts_of_mar({"vision_tower.weight": torch.zeros(1)})


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UserError, match="5 heads for a width of 12"):
        MaskedEncoder(width=12, heads=5)
