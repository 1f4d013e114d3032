"""Negatives of small local batches come from all ranks, and never from the row itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from umm_zoo.objectives.flow_matching import ContrastiveFlowMatching

pytestmark = pytest.mark.processes


def negatives_of_rank(rank: int, file: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
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
    torch.save(rows, f"{out}-sizes-{rank}")
    torch.save({"found": found, "one": one, "alone": alone, "uneven": uneven, "small": small, "apart": apart}, f"{out}-{rank}")
    dist.destroy_process_group()


def test_small_batches_share_their_negatives(tmp_path: Path) -> None:
    mp.spawn(negatives_of_rank, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    everything = {0.0, 1.0, 10.0, 11.0}
    for rank in range(2):
        result = torch.load(tmp_path / f"out-{rank}", weights_only=True)
        for row in range(2):
            assert set(result["found"][:, row].tolist()) == everything - {10.0 * rank + row}
        assert set(result["one"].tolist()) == {10.0 * (1 - rank)}


def test_ranks_with_fewer_rows_take_part(tmp_path: Path) -> None:
    mp.spawn(negatives_of_rank, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    rows = [[0.0, 1.0, 2.0], [10.0, 11.0]]
    for rank, own in enumerate(rows):
        result = torch.load(tmp_path / f"out-{rank}", weights_only=True)
        for row, value in enumerate(own):
            assert set(result["uneven"][:, row].tolist()) == {*rows[0], *rows[1]} - {value}
            assert set(result["small"][:, row].tolist()) == {*rows[0], *rows[1]} - {value}
            assert set(result["apart"][:, row].tolist()) == set(own) - {value}


def test_ranks_with_images_of_unequal_sizes_take_part(tmp_path: Path) -> None:
    mp.spawn(negatives_of_rank, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    rows = [torch.load(tmp_path / f"out-sizes-{rank}", weights_only=True) for rank in range(2)]
    seen = [{tuple(values) for values in row} for rank in rows for row in rank]
    assert seen == [
        {(0.0, 1.0, 2.0), (3.0, 3.0, 3.0)},
        {(10.0, 11.0, 12.0), (3.0, 3.0, 3.0)},
        {(10.0, 10.0), (0.0, 0.0)},
    ]
