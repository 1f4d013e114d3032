"""Heads over several codes per token: chances that are those of the codes given their predecessors, and sum to one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from umm_zoo.blocks.code_heads import CodeEmbeddings, CodeHead, DepthHead, GroupHead, SoftmaxHead
from umm_zoo.blocks.quantizers import BinaryQuantizer, FiniteScalarQuantizer, ResidualQuantizer, VectorQuantizer
from umm_zoo.testing import check_block

HEADS = {
    "softmax": lambda: SoftmaxHead(6, [3, 4, 2]),
    "group": lambda: GroupHead(6, bits=5, group_bits=2),
    "depth": lambda: DepthHead(6, [3, 4, 2], layers=2, heads=2, width=8),
}


def head(kind: str) -> CodeHead:
    torch.manual_seed(0)
    built = HEADS[kind]()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return built.eval()


@pytest.mark.parametrize("kind", HEADS)
def test_chances_of_all_tokens_sum_to_one(kind: str) -> None:
    block = head(kind)
    tokens = torch.tensor(list(itertools.product(*map(range, block.sizes))))
    state = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).expand(len(tokens), -1)
    logs = block(state, tokens).log_softmax(-1).gather(-1, tokens[..., None]).sum(dim=(1, 2))
    assert_close(logs.exp().sum(), torch.tensor(1.0))
    assert logs.std() > 0.1  # and they differ


@pytest.mark.parametrize("kind", HEADS)
def test_code_by_code_is_what_all_at_once_gives(kind: str) -> None:
    block = head(kind)
    states, codes = block.example_inputs()
    whole = block(states, codes)
    assert whole.shape == (6, len(block.sizes), max(block.sizes))
    for place in range(len(block.sizes)):
        assert_close(block.next(states, codes[:, :place]), whole[:, place])


@pytest.mark.parametrize("kind", HEADS)
def test_a_code_sees_those_before_it_alone(kind: str) -> None:
    block = head(kind)
    states, codes = block.example_inputs()
    moved = codes.clone()
    moved[:, 1] = (moved[:, 1] + 1) % block.sizes[1]
    before, after = block(states, codes), block(states, moved)
    assert_close(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2], before[:, 2])


@pytest.mark.parametrize("kind", HEADS)
def test_contract_of_blocks(kind: str) -> None:
    check_block(head(kind))


def test_nothing_beyond_a_code_s_own_size_has_a_chance() -> None:
    chances = head("softmax")(torch.randn(4, 6), torch.zeros(4, 3, dtype=torch.long)).softmax(-1)
    assert (chances[:, 0, 3] == 0).all() and (chances[:, 2, 2:] == 0).all() and (chances[:, 1] > 0).all()


def test_a_token_is_the_sum_of_its_codes() -> None:
    embed = CodeEmbeddings([3, 5], 4)
    tables = [table.weight for table in embed.tables]
    assert_close(embed(torch.tensor([[2, 4]])), (tables[0][2] + tables[1][4])[None])


def test_sizes_are_those_of_the_quantizers() -> None:
    assert GroupHead(4, bits=28).sizes == BinaryQuantizer(28).code_sizes == (2**14, 2**14)
    assert GroupHead(4, bits=25).sizes == BinaryQuantizer(25).code_sizes == (2**13, 2**12)
    with pytest.raises(ValueError, match="found 17, expected at most 16"):
        GroupHead(4, bits=28, group_bits=17)
    assert FiniteScalarQuantizer([8, 5, 5]).code_sizes == (200,)
    assert FiniteScalarQuantizer([8, 8, 8, 8, 8, 7]).code_sizes == (8, 8, 8, 8, 8, 7)
    assert ResidualQuantizer([VectorQuantizer(3, 9, normalised=False)], 4).code_sizes == (9, 9, 9, 9)
