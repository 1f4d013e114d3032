"""AdamW in one kernel: torch's steps within rounding, and checkpoints that either continues."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from umm_zoo.training import offloaded_optimizer
from umm_zoo.training.optimization import AdamW


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 7), (7,), (3, 3, 2))]


def steps(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for weight in own:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return [weight.detach().clone() for weight in own]


@pytest.mark.parametrize("first", [True, False])
def test_either_kernel_goes_on_from_the_others_checkpoint_with_its_own(first: bool) -> None:
    plain, mine = weights(), weights()
    expected = torch.optim.AdamW(
        [{"params": plain[:1] + plain[2:]}, {"params": plain[1:2], "weight_decay": 0.0}], 1e-2, weight_decay=0.1
    )
    makes = {kind: AdamW(1e-2, weight_decay=0.1, fused=kind) for kind in (True, False)}
    optimizer = makes[first].build({"part": mine})
    torch.testing.assert_close(steps(optimizer, mine, 1), steps(expected, plain, 1), rtol=1e-5, atol=1e-6)
    resumed = makes[not first].build({"part": mine})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [bool(group["fused"]) for group in resumed.param_groups] == [not first] * 2
    torch.testing.assert_close(steps(resumed, mine, 2), steps(expected, plain, 2), rtol=1e-5, atol=1e-6)


def test_moments_that_wait_make_the_same_updates_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloaded_optimizer, "_AT_A_TIME", 8 * 40)
    plain, mine = weights(), weights()
    expected = AdamW(1e-2, weight_decay=0.1).build({"part": plain})
    optimizer = offloaded_optimizer.OffloadedAdamW(1e-2, weight_decay=0.1).build({"part": mine})
    assert [len(some) for some in offloaded_optimizer.in_rounds(mine, 8 * 42)] == [2, 1]
    for own, theirs in zip(steps(optimizer, mine, 1), steps(expected, plain, 1), strict=True):
        assert torch.equal(own, theirs)
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    again = [nn.Parameter(weight.detach().clone()) for weight in mine]
    other = AdamW(1e-2, weight_decay=0.1).build({"part": again})
    other.load_state_dict(copy.deepcopy(expected.state_dict()))
    assert all(torch.equal(*pair) for pair in zip(steps(optimizer, mine, 2), steps(other, again, 2), strict=True))


def test_gradients_may_be_clipped_under_a_gradient_scaler() -> None:
    from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling

    assert not _optimizer_handles_unscaling(AdamW(1e-2).build({"part": weights()}))
