"""Queries, positions, connectors, details and pathways: the contract that all blocks keep, and what each one is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tests.backbones.vlm_parts import QWEN
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks import connectors, details, metaquery_connector, openuni_connector, pathways, positions, queries
from umm_zoo.blocks.connectors import MLPConnector, PositionMLP
from umm_zoo.blocks.details import VAEDetail
from umm_zoo.blocks.metaquery_connector import MetaQueryConnector
from umm_zoo.blocks.openuni_connector import OpenUniConnector
from umm_zoo.blocks.pathways import ExpertPathway, FrozenPathway
from umm_zoo.blocks.queries import (
    FrozenNoiseQueries,
    LearnedGridQueries,
    LearnedQueries,
    MarkedQueries,
    NoisyQueries,
    PlacedQueries,
    QuerySampler,
    ZeroQueries,
)
from umm_zoo.testing import check_block

BLOCKS: list[nn.Module] = [
    NoisyQueries(8),
    LearnedQueries(8, 6),
    MarkedQueries(8, 6),
    LearnedGridQueries(8, 5, 6),
    ZeroQueries(8),
    FrozenNoiseQueries(8, 5, 6),
    PlacedQueries(NoisyQueries(8), positions.CroppedTable2d(8, 5, 6)),
    PlacedQueries(LearnedQueries(8, 6), positions.SineCosine2d(8)),
    positions.CroppedTable2d(8, 5, 6),
    positions.SineCosine2d(8),
    PositionMLP(8, 6),
    PositionMLP(8, 6, 10, positions.SineCosine2d(8)),
    MLPConnector(8, 6),
    MLPConnector(8, 6, 10),
    MetaQueryConnector(8, 6, 2, 2),
    MetaQueryConnector(8, 6, 2, 4, kv_heads=2, hidden_dim=20),
    OpenUniConnector(8, 6, 2, 2, 20),
    OpenUniConnector(8, 6, 2, 2, 20, "proj_enc"),
    OpenUniConnector(8, 6, 2, 2, 20, "proj_enc_proj", 10),
    VAEDetail(3, 8),
    VAEDetail(3, 8, positions.CroppedTable2d(8)),
]


def attached(kind: type[pathways.QueryPathway], checkpointing: bool = False) -> pathways.QueryPathway:
    torch.manual_seed(0)
    pathway = kind(gradient_checkpointing=checkpointing)
    pathway.attach(Qwen25VL.from_config(QWEN))
    return pathway


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)
def test_block_keeps_the_contract(block):
    check_block(block, unused=["marker"])  # that of MarkedQueries stands in front of what forward makes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pathways_keep_the_contract(checkpointing):
    check_block(attached(ExpertPathway, checkpointing))
    check_block(attached(FrozenPathway, checkpointing), dtypes=(torch.float32,))  # its layers are the backbone's


def test_every_block_of_the_modules_is_checked():
    checked = {type(block) for block in BLOCKS} | {ExpertPathway, FrozenPathway}
    bases = (QuerySampler, positions.PositionEmbedding, connectors.Connector, details.DetailBranch, pathways.QueryPathway)
    for module in (queries, positions, connectors, metaquery_connector, openuni_connector, details, pathways):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, bases) and kind not in bases and not name.startswith("_"):
                assert kind in checked, name


def context(rows: int = 2, width: int = 8) -> Tokens:
    return Tokens(torch.randn(rows, 5, width))


def test_counts_and_grids():
    assert LearnedQueries(8, 9).grid_for(Grid(4, 7)) == Grid(3, 3)
    assert LearnedQueries(8, 6).grid_for(Grid(4, 7)) == Grid(1, 6)
    assert LearnedQueries(8, 6)(context(), Grid(4, 7)).shape == (2, 6, 8)
    for block in (NoisyQueries(8), LearnedGridQueries(8), ZeroQueries(8), FrozenNoiseQueries(8)):
        assert block(context(), Grid(4, 7)).shape == (2, 28, 8) and block.grid_for(Grid(4, 7)) == Grid(4, 7)


def test_smaller_grids_take_the_centre_of_learned_and_frozen_tables():
    for block in (LearnedGridQueries(3, 6, 7), FrozenNoiseQueries(3, 6, 7)):
        whole = block(context(1, 3), Grid(6, 7)).view(6, 7, 3)
        assert torch.equal(block(context(1, 3), Grid(3, 4)).view(3, 4, 3), whole[1:4, 1:5])
    with pytest.raises(ValueError, match="found a grid of 7 x 2 tokens, expected at most the table's 6 x 7"):
        LearnedGridQueries(3, 6, 7)(context(1, 3), Grid(7, 2))


def test_frozen_noise_needs_no_checkpoint():
    torch.manual_seed(1)
    first = FrozenNoiseQueries(4, 3, 3)
    torch.manual_seed(2)
    again, other = FrozenNoiseQueries(4, 3, 3), FrozenNoiseQueries(4, 3, 3, seed=1)
    assert not first.state_dict() and torch.equal(first.table, again.table) and not torch.equal(first.table, other.table)


def test_placed_queries_are_the_queries_and_their_places():
    block = PlacedQueries(ZeroQueries(8), positions.SineCosine2d(8))
    assert torch.equal(block(context(), Grid(2, 3)), positions.SineCosine2d(8)(torch.zeros(2, 6, 8), Grid(2, 3)))
    assert PlacedQueries(LearnedQueries(8, 6), positions.SineCosine2d(8)).grid_for(Grid(4, 4)) == Grid(1, 6)
    with pytest.raises(ValueError, match=r"found positions\.width 4, expected queries\.width, 8"):
        PlacedQueries(ZeroQueries(8), positions.SineCosine2d(4))


def test_noise_is_one_draw_in_every_dtype():
    block = NoisyQueries(8)
    draws = [
        block(Tokens(torch.zeros(1, 2, 8, dtype=dtype)), Grid(2, 3), torch.Generator().manual_seed(3)).float()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert_close(draws[1], draws[0], rtol=1e-2, atol=1e-2)


def test_every_position_embedding_tells_places_apart():
    for block in (positions.CroppedTable2d(8, init_std=1.0), positions.SineCosine2d(8)):
        marked = block(torch.ones(1, 12, 8), Grid(3, 4))[0]
        assert len({tuple(row.tolist()) for row in marked.detach()}) == 12
    tokens = torch.randn(2, 12, 8)
    assert torch.equal(positions.CroppedTable2d(8)(tokens, Grid(3, 4)), tokens)  # zeros at first
    with pytest.raises(ValueError, match="found 6, expected a multiple of 4"):
        positions.SineCosine2d(6)


def test_position_mlp_by_hand():
    block = PositionMLP(4, 3, 5)
    block.match_rms(1.5)
    with torch.no_grad():
        block.positions.table.normal_()
    x = torch.randn(1, 6, 4)
    z = x + block.positions.table[31:33, 30:33].reshape(6, 4)  # 64 x 64, centre 2 x 3
    gate, up = z @ block.gate.weight.T + block.gate.bias, z @ block.up.weight.T + block.up.bias
    y = (gate * torch.sigmoid(gate) * up) @ block.down.weight.T + block.down.bias
    expected = 1.5 * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(block(Tokens(x), Grid(2, 3)).values, expected)
    with pytest.raises(ValueError, match="positions: found a width of 8, expected in_dim, 4"):
        PositionMLP(4, 3, positions=positions.SineCosine2d(8))


def test_mlp_connector_by_hand():
    block, x = MLPConnector(3, 5), 3 * torch.randn(1, 4, 3)
    assert block.wide.weight.shape == (10, 3)  # the release's is twice the condition's width, whatever the language model's
    inner = x @ block.wide.weight.T + block.wide.bias
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    assert_close(block(Tokens(x), Grid(2, 2)).values, inner @ block.out.weight.T + block.out.bias)


def test_mlp_connector_has_the_parameters_of_the_release():
    with torch.device("meta"):
        block = MLPConnector(2048, 4096)
    assert sum(p.numel() for p in block.parameters()) == 50_343_936


def test_detail_is_one_linear_layer_per_cell():
    block = VAEDetail(3, 8)
    latents = torch.randn(2, 3, 2, 5)
    expected = F.conv2d(latents, block.projection.weight[..., None, None], block.projection.bias)
    assert_close(block(latents)[:, 7], expected[:, :, 1, 2])


def test_the_prefix_is_read_and_not_written():
    pathway = attached(ExpertPathway)
    prefix, details, queries, grid = pathway.example_inputs()
    before = [layer.keys.shape for layer in prefix.cache.layers]
    first = pathway(prefix, details, queries, grid)
    assert [layer.keys.shape for layer in prefix.cache.layers] == before
    assert torch.equal(pathway(prefix, details, queries, grid), first)
    chosen = pathway.stack._config._attn_implementation
    weights = list(pathway.attention(prefix, details, queries, grid))
    assert len(weights) == 2 and weights[0].shape == (2, 2, 6, 4 + 2 + 6)
    assert_close(weights[1].sum(-1), torch.ones(2, 2, 6))
    assert not weights[0][0, :, :, 0].any()  # padding of the first row
    assert pathway.stack._config._attn_implementation == chosen != "eager"  # restored


def test_borrowed_layers_are_not_the_pathways_own():
    assert not list(attached(FrozenPathway).parameters()) and not attached(FrozenPathway).state_dict()


def test_the_norm_of_a_position_mlp_is_exact_under_autocast() -> None:
    connector = PositionMLP(8, 37)
    connector.match_rms(3.0)
    with torch.autocast("cpu", torch.bfloat16):
        made = connector(Tokens(torch.randn(2, 12, 8)), Grid(3, 4)).values
    assert made.dtype == torch.float32
    assert_close(made.square().mean(-1).sqrt(), torch.full((2, 12), 3.0), atol=1e-3, rtol=0)  # rounded to bfloat16: 4e-3 off
