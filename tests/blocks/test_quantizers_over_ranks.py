"""Codes that follow means move alike on two ranks, as on one that has all tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from umm_zoo.blocks.quantizers import EMAQuantizer

pytestmark = pytest.mark.processes


def quantizer(restart_below: float = 0.995) -> EMAQuantizer:
    """Codes that no token of the step chose (their counts fall to .99) start again."""
    torch.manual_seed(0)
    return EMAQuantizer(3, 16, restart_below=restart_below)


def tokens(rank: int) -> torch.Tensor:
    return torch.randn(1, 4 + 3 * rank, 3, generator=torch.Generator().manual_seed(rank))


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = quantizer()
    torch.manual_seed(10 + rank)  # ranks draw other numbers
    own(tokens(rank))
    own.after_step()
    torch.save(own.state_dict(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_move_codes_as_one_does(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_close(first, second, atol=0, rtol=0)
    one = quantizer(restart_below=0.0)
    for rank in range(2):
        one(tokens(rank))
    one.after_step()
    kept = one.counts > 0.995
    assert_close(first["counts"][kept], one.counts[kept])
    assert_close(first["sums"][kept], one.sums[kept])
    again = first["codebook"][~kept]
    assert 0 < len(again) < 16 and all((tokens(0)[0] == code).all(dim=1).any() for code in again)  # a latent of rank 0
