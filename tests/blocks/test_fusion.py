"""Fusions of two grids of tokens: order, widths, sums, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from umm_zoo.batch import Grid
from umm_zoo.blocks.bottlenecks import LinearProjection, MLPProjection
from umm_zoo.blocks.fusion import DetailOnly, LengthFusion, SumFusion, TokenFusion, WidthFusion
from umm_zoo.blocks.positions import SineCosine2d
from umm_zoo.testing import check_block

GRID, WIDE, NARROW, WIDTH = Grid(3, 2), 7, 4, 8
KINDS = {
    "width": lambda **more: WidthFusion(MLPProjection(WIDE + NARROW, WIDTH), NARROW, **more),
    "length": lambda **more: LengthFusion(LinearProjection(WIDE, WIDTH), LinearProjection(NARROW, WIDTH), **more),
    "sum": lambda **more: SumFusion(LinearProjection(WIDE, WIDTH), MLPProjection(NARROW, WIDTH), **more),
    "detail": lambda **more: DetailOnly(LinearProjection(NARROW, WIDTH), **more),
}


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, GRID.num_cells, WIDE), torch.randn(2, GRID.num_cells, NARROW)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, placed: bool) -> None:
    check_block(KINDS[kind](**({"positions": SineCosine2d(WIDTH)} if placed else {})))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_changes_its_own_tokens_alone(kind: str, side: int) -> None:
    fusion, given = KINDS[kind](positions=SineCosine2d(WIDTH)), list(tokens())
    before, (row, column) = fusion(*given, GRID), (1, 0)
    given[side] = given[side].clone()
    given[side].view(2, *GRID, -1)[0, row, column] += 1
    changed = (fusion(*given, GRID) != before).any(dim=-1)
    place = row * GRID.w + column
    if kind == "length":
        place += side * GRID.num_cells
    assert changed[0].nonzero().flatten().tolist() == ([] if (kind, side) == ("detail", 0) else [place])
    assert not changed[1].any()


def test_emma_at_its_own_widths() -> None:
    fusion = WidthFusion(LinearProjection(4 * 1152 + 32, 5), 32)
    seen: list[torch.Size] = []
    fusion.adapter.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    made = fusion(torch.randn(1, 6, 4 * 1152), torch.randn(1, 6, 32), GRID)
    assert seen == [(1, 6, 4640)] and made.shape == (1, 6, 5)


def test_a_linear_adapter_over_both_is_the_sum_of_one_over_each() -> None:
    wide, narrow = LinearProjection(WIDE, WIDTH), LinearProjection(NARROW, WIDTH)
    both = LinearProjection(WIDE + NARROW, WIDTH)
    with torch.no_grad():
        both.linear.weight.copy_(torch.cat([wide.linear.weight, narrow.linear.weight], dim=1))
        both.linear.bias.copy_(wide.linear.bias + narrow.linear.bias)
    assert_close(WidthFusion(both, NARROW)(*tokens(), GRID), SumFusion(wide, narrow)(*tokens(), GRID))


def test_both_halves_of_a_length_get_the_same_positions() -> None:
    places = SineCosine2d(WIDTH)
    plain, placed = LengthFusion(LinearProjection(WIDE, WIDTH), LinearProjection(NARROW, WIDTH)), None
    placed = LengthFusion(plain.understanding, plain.detail, places)
    added = placed(*tokens(), GRID) - plain(*tokens(), GRID)
    expected = places(torch.zeros(2, GRID.num_cells, WIDTH), GRID)
    assert_close(added, torch.cat([expected, expected], dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fusion", "side", "count", "message"),
    [
        ("width", 1, 5, r"WidthFusion: found detail tokens \[5, 4\], expected \[6, 4\] on a grid of 3 x 2"),
        ("length", 0, 8, r"LengthFusion: found understanding tokens \[8, 7\], expected \[6, 7\] on a grid of 3 x 2"),
    ],
)
def test_unequal_grids_are_refused(fusion: str, side: int, count: int, message: str) -> None:
    given, made = list(tokens()), KINDS[fusion]()
    given[side] = torch.randn(2, count, given[side].shape[-1])
    with pytest.raises(ValueError, match=message):
        made(*given, GRID)


def test_widths_that_do_not_fit_are_refused() -> None:
    wide, narrow = LinearProjection(WIDE, WIDTH), LinearProjection(NARROW, WIDTH + 4)
    bad: list[tuple[type[TokenFusion], tuple, str]] = [
        (SumFusion, (wide, narrow), "SumFusion: found projections to 8 and 12, expected one width"),
        (WidthFusion, (wide, 7), "WidthFusion.adapter: found an in_dim of 7, expected more than 7"),
        (DetailOnly, (narrow, SineCosine2d(8)), "DetailOnly.positions: found a width of 8, expected 12"),
    ]
    for kind, arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            kind(*arguments)
