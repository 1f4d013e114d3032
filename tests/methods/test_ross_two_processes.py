"""ROSS on two gloo processes takes the step that one process takes on both halves of the batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.methods.test_ross import VARIANTS, batch, build
from umm_zoo.batch import Batch
from umm_zoo.methods.ross import ROSS

pytestmark = pytest.mark.processes


class Loss(torch.nn.Module):
    """DistributedDataParallel only reduces what happens in ``forward``."""

    def __init__(self, method: ROSS) -> None:
        super().__init__()
        self.method = method

    def forward(self, rows: Batch) -> torch.Tensor:
        return self.method.training_losses(rows)["loss"]


def method() -> ROSS:
    return build(*VARIANTS["r-pixel"]())


def half(rank: int) -> Batch:
    """Halves with the same number of images and answer tokens: means of means are means then."""
    return batch((1, 1), seed=rank)


def gradients(module: ROSS) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def work(rank: int) -> dict[str, torch.Tensor]:
    module = method()
    wrapped = DistributedDataParallel(Loss(module))  # kept by name: its hooks die with it
    wrapped(half(rank)).backward()
    found = {name: gradient.clone() for name, gradient in gradients(module).items()}
    for _ in range(2):  # one rank has images, the other has none: no rank may wait for a gradient that does not come
        wrapped(batch((1, 1) if rank else (0, 0))).backward()
    dist.barrier()
    del wrapped  # before the group: once a rank that freed it afterwards never came back
    return found


def test_gradients_of_two_processes_are_those_of_one() -> None:
    first, second = on_two_ranks(work)
    module, halves = method(), [half(rank) for rank in range(2)]
    whole = Batch(
        [key + str(i) for i, part in enumerate(halves) for key in part.keys],
        [turns for part in halves for turns in part.conversations],
        [image for part in halves for image in part.images],
        [1] * 4,
    )
    module.training_losses(whole)["loss"].backward()
    expected = gradients(module)
    assert first.keys() == second.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name])
        assert_close(first[name], gradient, rtol=1e-4, atol=1e-6)
