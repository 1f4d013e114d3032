"""Contracts of the blocks' base classes, beyond the general one: shapes on several grids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.backbones.token_codec import TokenCodec
from umm_zoo.backbones.unified import UnifiedAR
from umm_zoo.batch import Grid, Tokens
from umm_zoo.blocks.connectors import Connector
from umm_zoo.blocks.details import DetailBranch
from umm_zoo.blocks.fusion import TokenFusion
from umm_zoo.blocks.pathways import QueryPathway
from umm_zoo.blocks.positions import PositionEmbedding
from umm_zoo.blocks.quantizers.base import Quantizer
from umm_zoo.blocks.queries import QuerySampler


@torch.no_grad()
def check_role(block: nn.Module) -> None:
    """Shapes on several grids, and whatever else the base class promises.

    Raises:
        AssertionError: says what was expected and what was found.
    """
    with torch.random.fork_rng(devices=[]):
        for grid in (Grid(1, 1), Grid(2, 3), Grid(3, 2)):
            _check_shapes(block, grid)
        if isinstance(block, QueryPathway):
            _check_pathway(block)
        if isinstance(block, UnifiedAR):
            _check_unified(block)


def _check_shapes(block: nn.Module, grid: Grid) -> None:
    if isinstance(block, QuerySampler):
        count = block.grid_for(grid).num_cells
        _expect(block, grid, block(Tokens(torch.randn(2, 5, block.width)), grid), (2, count, block.width))
    elif isinstance(block, PositionEmbedding):
        _expect(block, grid, block(torch.randn(2, grid.num_cells, block.width), grid), (2, grid.num_cells, block.width))
    elif isinstance(block, Connector):
        mask = torch.ones(2, grid.num_cells, dtype=torch.bool)
        found = block(Tokens(torch.randn(2, grid.num_cells, block.in_dim), mask), grid)
        _expect(block, grid, found.values, (2, grid.num_cells, block.out_dim))
        assert found.mask is not None, f"{type(block).__name__}: expected the mask of the states to be handed on, found none"
    elif isinstance(block, DetailBranch):
        found = block(torch.randn(2, block.latent_channels, *grid))
        _expect(block, grid, found, (2, grid.num_cells, block.width))
    elif isinstance(block, TokenFusion):
        count, (understanding, detail, _) = grid.num_cells, block.example_inputs()
        found = block(torch.randn(2, count, understanding.shape[-1]), torch.randn(2, count, detail.shape[-1]), grid)
        _expect(block, grid, found, (2, block.tokens_per_cell * count, block.width))
    elif isinstance(block, TokenCodec):
        _check_codes(block, grid)
    elif isinstance(block, Quantizer):
        _check_quantizer(block, grid)


def _check_codes(block: TokenCodec, grid: Grid) -> None:
    name, height, width = type(block).__name__, grid.h * block.downsampling, grid.w * block.downsampling
    codes = block.codes(torch.rand(2, 3, height, width) * 2 - 1)
    assert codes.dtype == torch.long and codes.ndim == 3, (
        f"{name}: expected long codes [M, N, D], found {codes.dtype} {codes.shape}"
    )
    _expect(block, grid, codes, (2, grid.num_cells, codes.shape[-1]))
    low, high = int(codes.min()), int(codes.max())
    assert low >= 0 and high < block.num_codes, f"{name}: expected codes from 0 to {block.num_codes - 1}, found {low} to {high}"
    images = block.images(codes, grid)
    _expect(block, grid, images, (2, 3, height, width))
    assert images.abs().max() <= 1, f"{name}: expected images in [-1, 1], found {float(images.abs().max()):.3f}"


def _check_quantizer(block: Quantizer, grid: Grid) -> None:
    name, block = type(block).__name__, block.eval()
    found = block(torch.randn(2, grid.num_cells, block.dim))
    _expect(block, grid, found.embeddings, (2, grid.num_cells, block.dim))
    _expect(block, grid, found.codes, (2, grid.num_cells, block.codes_per_token))
    assert not found.losses, f"{name}: expected no losses in evaluation mode, found {sorted(found.losses)}"
    assert found.codes.dtype == torch.long, f"{name}: expected long codes, found {found.codes.dtype}"
    if not block.codes_per_token:
        return
    low, high = int(found.codes.min()), int(found.codes.max())
    assert low >= 0 and high < block.num_codes, f"{name}: expected codes from 0 to {block.num_codes - 1}, found {low} to {high}"
    off = float((block.values_of(found.codes) - found.embeddings).abs().max())
    assert off == 0, f"{name}: expected values_of to give back the embeddings of the codes, found others, off by {off:.3g}"


def _check_pathway(block: QueryPathway) -> None:
    name = type(block).__name__
    prefix, details, queries, grid = block.example_inputs()
    queries = queries.to(next(block.stack.parameters()).dtype)
    layers: list[Any] = list(prefix.cache.layers)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    first = block(prefix, details, queries, grid)
    for layer, (keys, values) in zip(layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values), (
            f"{name}: expected the prompt's keys and values to stay as they are, found others"
        )
    _expect(block, grid, first, tuple(queries.shape))
    changed = replace(details, tokens=details.tokens + 9.0 * ~details.mask[..., None])
    second = block(prefix, changed, queries, grid)
    assert torch.allclose(first, second, atol=1e-5), f"{name}: expected padding of details to be masked, found a query that sees it"
    if not block.bidirectional:
        changed_queries = queries.clone()
        changed_queries[:, -1] += 1
        later = block(prefix, details, changed_queries, grid)[:, :-1]
        assert torch.allclose(first[:, :-1], later, atol=1e-5), f"{name}: expected causal queries, found one that sees a later one"


def _check_unified(block: UnifiedAR) -> None:
    """Sampled tokens are scored alike when they are given, and a row knows its own prompt and seed alone."""
    name, inputs, seeds = type(block).__name__, block.image_prompt(["red", "a large blue square"]), [1, 2, 3, 4]
    count = block.generated_grid.num_cells * block.codes_per_token
    for scale in (1.0, 3.0):
        drawn = block.sample_image(inputs, seeds, scale)
        assert tuple(drawn.ids.shape) == (4, count), f"{name}: expected ids [4, {count}], found {list(drawn.ids.shape)}"
        scored = block.image_log_probs(inputs, drawn.ids, scale)
        gap = float((scored - drawn.log_probs).abs().max())
        assert gap < 1e-3, f"{name}: expected sampling and scoring to agree at scale {scale}, found a difference of {gap:.1e} nats"
        alone = block.sample_image(block.image_prompt(["red"]), seeds[1:2], scale)
        assert torch.equal(alone.ids[0], drawn.ids[1]), f"{name}: expected a row to be the same alone and in a batch, found another"
    logits = block.image_logits(inputs, drawn.ids)
    expected = (4, count, block.codec.num_codes)
    assert tuple(logits.shape) == expected, f"{name}: expected logits {list(expected)}, found {list(logits.shape)}"


def _expect(block: nn.Module, grid: Grid, found: Tensor, shape: tuple[int, ...]) -> None:
    assert tuple(found.shape) == shape, (
        f"{type(block).__name__}: expected {list(shape)} on a grid of {grid.h} x {grid.w}, found {list(found.shape)}"
    )
