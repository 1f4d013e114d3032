"""Connectors that carry a release's name: tensors by name, outputs to float tolerance, the release's sizes and first weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.references.connector_reference import metaquery, metaquery_weights, openuni, openuni_weights
from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.metaquery_connector import FinalNorm, HeadNorm, MetaQueryConnector, RMSNorm
from umm_zoo.blocks.openuni_connector import OpenUniConnector


def counted(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


@pytest.mark.parametrize(
    ("in_dim", "out_dim", "depth", "heads", "kv_heads", "hidden_dim", "count"),
    [
        (128, 20, 2, None, None, None, 7),
        (200, 36, 1, None, None, None, 33),  # three heads of 66: their channels are fewer than the width
        (66, 10, 1, None, None, 30, 1),
        (48, 12, 3, 4, 2, None, 10),  # two heads share keys and values
        (30, 16, 2, 3, 1, 50, 5),
    ],
)
def test_metaquerys_connector_is_the_release(
    in_dim: int, out_dim: int, depth: int, heads: int | None, kv_heads: int | None, hidden_dim: int | None, count: int
) -> None:
    weights = metaquery_weights(in_dim, out_dim, depth, heads or in_dim // 64, kv_heads, hidden_dim)
    block = MetaQueryConnector(in_dim, out_dim, depth, heads, kv_heads, hidden_dim)
    block.connector.load_state_dict(weights)
    states = torch.randn(2, count, in_dim) * torch.tensor([2.0, 1e-3])[:, None, None]  # an eps is seen by small ones
    expected = torch.stack([metaquery(weights, row) for row in states])
    assert_close(block(Tokens(states), Grid(1, count)).values.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("in_dim", "out_dim", "depth", "heads", "hidden_dim", "proj_type", "width"),
    [
        (48, 20, 2, 3, 100, "enc_proj", 0),
        (50, 36, 3, 5, 70, "enc_proj", 0),
        (15, 14, 1, 3, 8, "enc_proj", 0),  # heads of an odd size
        (24, 21, 2, 7, 30, "proj_enc", 0),
        (24, 10, 2, 4, 30, "proj_enc_proj", 36),
    ],
)
def test_openunis_connector_is_the_release(
    in_dim: int, out_dim: int, depth: int, heads: int, hidden_dim: int, proj_type: str, width: int
) -> None:
    weights = openuni_weights(in_dim, out_dim, depth, hidden_dim, proj_type, width)
    block = OpenUniConnector(in_dim, out_dim, depth, heads, hidden_dim, proj_type, width or None)  # type: ignore[arg-type]
    block.load_state_dict(weights)
    states = torch.randn(2, 9, in_dim) * torch.tensor([2.0, 1e-3])[:, None, None]
    expected = torch.stack([openuni(weights, row, heads, proj_type) for row in states])
    assert_close(block(Tokens(states), Grid(3, 3)).values.double(), expected, rtol=1e-5, atol=1e-5)


def test_releases_sizes() -> None:
    with torch.device("meta"):
        large, small = OpenUniConnector(1536, 2304), OpenUniConnector(896, 2304, heads=14, hidden_dim=3072)
        metas = MetaQueryConnector(2048, 2304)
    attention, feed_forward = 4 * (1536**2 + 1536), 2 * 1536 * 8960 + 8960 + 1536
    assert counted(large) == 6 * (attention + feed_forward + 4 * 1536) + 1536 * 2304 + 2304 == 225_451_776
    assert counted(small) == 6 * (4 * (896**2 + 896) + 2 * 896 * 3072 + 3072 + 896 + 4 * 896) + 896 * 2304 + 2304
    assert metas.connector[0].layers[23].self_attn.q_norm.gamma.shape == (32, 1, 64)
    layer = 4 * 2048**2 + 3 * 2048 + 2 * 2048 + 3 * 4 * 2048**2 + 2 * 2048
    assert counted(metas) == 24 * layer + 2048 * 2304 + 2304 + 2304**2 + 2304 + 2304


def test_metaquerys_first_weights() -> None:
    block = MetaQueryConnector(192, 100, 2)
    block.match_rms(5.5**0.5)
    for name, value in block.connector.state_dict().items():
        if re.fullmatch(r"0\..*_proj\.weight", name):
            assert value.std().item() == pytest.approx(0.014, rel=0.02) and abs(value.mean()) < 3e-4, name
        elif name.startswith("0."):
            assert (value == (0.0 if name.endswith("bias") else 1.0)).all(), name
    assert block.connector[1].weight.abs().max().item() == pytest.approx(192**-0.5, rel=0.01)  # the library's own start
    assert (block.connector[4].weight == 5.5**0.5).all()


def test_openunis_first_weights() -> None:
    block = OpenUniConnector(96, 100, 2, 3, 200)
    for name, value in block.connector.state_dict().items():
        bound = (6 / sum(value.shape)) ** 0.5 if value.ndim == 2 else 0.0  # Xavier's: uniform up to it
        if value.ndim == 2:
            assert value.abs().max().item() == pytest.approx(bound, rel=0.01), name
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.02), name
        elif ".fc" in name:
            assert value.std().item() == pytest.approx(1e-6, rel=0.3) and value.any(), name
        else:
            assert (value == (1.0 if name.endswith("norm1.weight") or name.endswith("norm2.weight") else 0.0)).all(), name
    assert block.projector.weight.abs().max().item() == pytest.approx(96**-0.5, rel=0.01)


def test_openuni_does_not_see_the_order_and_metaquery_does() -> None:
    states, order, grid = torch.randn(1, 6, 128), torch.tensor([3, 0, 5, 1, 4, 2]), Grid(2, 3)
    plain = OpenUniConnector(128, 8, 2, 4, 50)
    assert_close(plain(Tokens(states[:, order]), grid).values, plain(Tokens(states), grid).values[:, order])
    placed = MetaQueryConnector(128, 8, 2)
    difference = placed(Tokens(states[:, order]), grid).values - placed(Tokens(states), grid).values[:, order]
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("block", [MetaQueryConnector(24, 6, 2, 3), OpenUniConnector(24, 6, 2, 3, 20)])
def test_both_are_bidirectional_and_heed_the_mask(block: nn.Module) -> None:
    states = torch.randn(1, 5, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(Tokens(states), Grid(1, 5)).values[0, 0, :3].sum(), states)
    assert gradient[0].abs().sum(-1).all()
    mask, changed = torch.tensor([[True] * 4 + [False]]), states.detach().clone()
    changed[:, 4] += 1
    first, second = (block(Tokens(values, mask), Grid(1, 5)).values[:, :4] for values in (states, changed))
    assert_close(first, second)


def test_norms_round_where_their_libraries_do() -> None:
    x, gains = torch.randn(4, 8).bfloat16(), torch.rand(8) + 0.5
    scaled = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-2).sqrt()
    inner, last = RMSNorm(8, 1e-2), FinalNorm(8, 1e-2)
    for norm in (inner, last):
        norm.weight.data = gains
    assert_close(inner(x), scaled.bfloat16() * gains)  # bfloat16 states, float32 gains
    assert_close(last(x), scaled * gains)
    half = gains.bfloat16()
    for norm in (inner.bfloat16(), last.bfloat16()):
        assert torch.equal(norm(x), scaled.bfloat16() * half)


def test_head_norm_by_hand() -> None:
    block = HeadNorm(2, 2)
    block.gamma.data = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    x = torch.tensor([[[[3.0, 4.0]], [[0.0, 0.0]]]])
    assert_close(block(x), torch.tensor([[[[0.6 * 2**0.5, 1.6 * 2**0.5]], [[0.0, 0.0]]]]))  # a vector of zeros stays


@pytest.mark.parametrize("grid", [Grid(1, 7), Grid(7, 1)])
def test_rotations_do_not_lose_precision_in_half(grid: Grid) -> None:
    weights = metaquery_weights(128, 20, 1, 2)
    block = MetaQueryConnector(128, 20, 1)
    block.connector.load_state_dict(weights)
    states = torch.randn(1, 7, 128)
    expected = metaquery(weights, states[0])
    found = block.bfloat16()(Tokens(states.bfloat16()), grid).values[0].double()
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MetaQueryConnector(32, 6), "heads: found 0 for a width of 32, expected"),
        (lambda: MetaQueryConnector(135, 6, 1), "makes heads of 67 channels, expected some of an even size"),
        (lambda: MetaQueryConnector(128, 6, 1, 4, 3), "kv_heads: found 3, expected a divisor of heads, 4"),
        (lambda: MetaQueryConnector(128, 6, 1, 4, 0), "kv_heads: found 0"),
        (lambda: OpenUniConnector(50, 6, 1, 4), "heads: found 4, expected a divisor of the encoder's width, 50"),
        (lambda: OpenUniConnector(50, 6, 1, 5, 8, "proj"), "proj_type: found 'proj', expected"),
        (lambda: OpenUniConnector(50, 6, 1, 5, 8, "proj_enc_proj"), "width: found None, expected the encoder's width"),
        (lambda: OpenUniConnector(50, 6, 1, 5, 8, width=60), "width: found 60, expected none, for the encoder has 50"),
    ],
)
def test_impossible_sizes_are_refused(build, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
