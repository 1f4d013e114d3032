"""The per-token head: sizes of the release, no attention, zero at first."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from umm_zoo.batch import Tokens
from umm_zoo.blocks.token_head import TokenMLPHead
from umm_zoo.testing import check_block


def trained(**more: bool) -> TokenMLPHead:
    torch.manual_seed(0)
    head = TokenMLPHead(6, channels=5, width=16, depth=2, **more)
    for parameter in head.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return head


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    torch.manual_seed(3)
    return torch.randn(count, 5, 1, 1), torch.randint(0, 1000, (count,)).double(), Tokens(torch.randn(count, 1, 6))


@pytest.mark.parametrize("states, width, depth, count", [(1024, 1024, 3, 20_261_920), (1280, 1536, 12, 151_206_944)])
def test_parameters_of_the_released_sizes(states: int, width: int, depth: int, count: int) -> None:
    with torch.device("meta"):
        head = TokenMLPHead(states, width=width, depth=depth, learned_variance=True)
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_it_keeps_its_contract_with_and_without_variance() -> None:
    noisy, time, condition = rows(3)
    check_block(trained(), (noisy, time, condition), output_shape=(3, 5, 1, 1))
    check_block(trained(learned_variance=True), (noisy, time, condition), output_shape=(3, 10, 1, 1))


def test_a_row_does_not_depend_on_others() -> None:
    noisy, time, condition = rows(7)
    own = trained()
    together = own(noisy, time, condition)
    alone = torch.cat([own(noisy[[n]], time[[n]], Tokens(condition.values[[n]])) for n in range(7)])
    assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_its_first_output_is_zero() -> None:
    assert not TokenMLPHead(6, channels=5, width=16, depth=1)(*rows(2)).any()


def test_a_scale_of_the_time_is_another_time() -> None:
    noisy, time, condition = rows(4)
    own = trained()
    expected = own(noisy, time, condition)
    own.time_scale = 1000.0
    assert_close(own(noisy, time / 1000, condition), expected, atol=1e-4, rtol=1e-4)


def test_a_condition_of_several_tokens_is_refused() -> None:
    noisy, time, condition = rows(4)
    with pytest.raises(ValueError, match=r"expected \(\[2, 5, 1, 1\], \[2, 1, 6\]\)"):
        trained()(noisy[:2], time[:2], Tokens(condition.values.view(2, 2, 6)))
