"""Negatives of small local batches come from all ranks, and never from the row itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_two_ranks

from umm_zoo.objectives.flow_matching import ContrastiveFlowMatching

pytestmark = pytest.mark.processes


def negatives_of_rank(rank: int) -> dict[str, Any]:
    velocity = torch.tensor([10.0 * rank, 10.0 * rank + 1]).reshape(2, 1, 1, 1)
    flow = ContrastiveFlowMatching(gather_below=8)
    found = torch.stack([flow.negatives([velocity], torch.Generator().manual_seed(i))[0].flatten() for i in range(30)])
    one = torch.cat([flow.negatives([velocity[:1]])[0].flatten() for _ in range(3)])
    with torch.no_grad():
        alone = flow.negatives([velocity[: rank + 1]])[0]  # ranks differ here: an exchange would hang
    fewer = velocity if rank else torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1)  # rank 1 lost a bad sample
    uneven = torch.stack([flow.negatives([fewer], torch.Generator().manual_seed(i))[0].flatten() for i in range(40)])
    edge = ContrastiveFlowMatching(gather_below=3)  # rank 0 alone has enough
    small = torch.stack([edge.negatives([fewer], torch.Generator().manual_seed(i))[0].flatten() for i in range(40)])
    enough = ContrastiveFlowMatching(gather_below=2)
    apart = torch.stack([enough.negatives([fewer], torch.Generator().manual_seed(i))[0].flatten() for i in range(40)])
    wide, tall = torch.tensor([[[[0.0, 1.0, 2.0]]]]), torch.tensor([[[[3.0], [4.0]]]])
    groups = [wide, tall] if rank else [wide + 10]  # sizes and their number differ among ranks
    rows: list[list[list[float]]] = [[] for _ in groups]
    for number in range(40):
        for row, other in enumerate(flow.negatives(groups, torch.Generator().manual_seed(number))):
            rows[row].append(other.flatten().tolist())
    return {"found": found, "one": one, "alone": alone, "uneven": uneven, "small": small, "apart": apart, "sizes": rows}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_two_ranks(negatives_of_rank)


def test_small_batches_share_their_negatives(results: list[dict[str, Any]]) -> None:
    everything = {0.0, 1.0, 10.0, 11.0}
    for rank, result in enumerate(results):
        for row in range(2):
            assert set(result["found"][:, row].tolist()) == everything - {10.0 * rank + row}
        assert set(result["one"].tolist()) == {10.0 * (1 - rank)}


def test_ranks_with_fewer_rows_take_part(results: list[dict[str, Any]]) -> None:
    rows = [[0.0, 1.0, 2.0], [10.0, 11.0]]
    for own, result in zip(rows, results, strict=True):
        for row, value in enumerate(own):
            assert set(result["uneven"][:, row].tolist()) == {*rows[0], *rows[1]} - {value}
            assert set(result["small"][:, row].tolist()) == {*rows[0], *rows[1]} - {value}
            assert set(result["apart"][:, row].tolist()) == set(own) - {value}


def test_ranks_with_images_of_unequal_sizes_take_part(results: list[dict[str, Any]]) -> None:
    seen = [{tuple(values) for values in row} for result in results for row in result["sizes"]]
    assert seen == [
        {(0.0, 1.0, 2.0), (3.0, 3.0, 3.0)},
        {(10.0, 11.0, 12.0), (3.0, 3.0, 3.0)},
        {(10.0, 10.0), (0.0, 0.0)},
    ]
