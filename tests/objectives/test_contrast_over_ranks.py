"""Negatives of small local batches come from all ranks, and never from the row itself."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from umm_zoo.objectives.flow_matching import ContrastiveFlowMatching


def negatives_of_rank(rank: int, file: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    velocity = torch.tensor([10.0 * rank, 10.0 * rank + 1]).reshape(2, 1, 1, 1)
    flow = ContrastiveFlowMatching(gather_below=8)
    found = torch.stack([flow.negatives(velocity, torch.Generator().manual_seed(i)).flatten() for i in range(30)])
    one = torch.cat([flow.negatives(velocity[:1]).flatten() for _ in range(3)])
    with torch.no_grad():
        alone = flow.negatives(velocity[: rank + 1])  # ranks differ here: an exchange would hang
    torch.save({"found": found, "one": one, "alone": alone}, f"{out}-{rank}")
    dist.destroy_process_group()


def test_small_batches_share_their_negatives(tmp_path: Path) -> None:
    mp.spawn(negatives_of_rank, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    everything = {0.0, 1.0, 10.0, 11.0}
    for rank in range(2):
        result = torch.load(tmp_path / f"out-{rank}", weights_only=True)
        for row in range(2):
            assert set(result["found"][:, row].tolist()) == everything - {10.0 * rank + row}
        assert set(result["one"].tolist()) == {10.0 * (1 - rank)}
