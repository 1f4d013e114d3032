"""AdamW with moments of 8 bit: one line where the library is missing, AdamW's steps within its rounding, states that resume."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from umm_zoo.errors import UserError
from umm_zoo.training.optimization import AdamW, AdamW8bit


def made(kind: type[AdamW], weight: nn.Parameter) -> torch.optim.Optimizer:
    return kind(lr=1e-2, weight_decay=0.1).build({"part": [weight]})


def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        weight.grad = torch.randn(weight.shape, generator=generator) + 1
        optimizer.step()


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"training.optimizer: found no package bitsandbytes.*pip install bitsandbytes"):
        made(AdamW8bit, nn.Parameter(torch.ones(2, 2)))


def test_a_check_counts_a_byte_per_moment() -> None:
    large, small = nn.Parameter(torch.empty(64, 128)), nn.Parameter(torch.empty(8, 8))
    assert AdamW(1e-3).state_bytes(large) == 2 * 4 * 64 * 128
    assert AdamW8bit(1e-3).state_bytes(large) == 2 * (64 * 128 + 4 * 32) and AdamW8bit(1e-3).state_bytes(small) == 2 * 4 * 64


def test_steps_are_adamws_within_rounding_and_go_on_from_stored_states() -> None:
    pytest.importorskip("bitsandbytes")
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    own, plain = made(AdamW8bit, weights[0]), made(AdamW, weights[1])
    try:
        steps(own, weights[0], 3)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit optimiser for this device: {error}")
    steps(plain, weights[1], 3)
    torch.testing.assert_close(weights[0], weights[1], atol=2e-3, rtol=0)
    assert {value.dtype for value in own.state[weights[0]].values() if isinstance(value, torch.Tensor)} >= {torch.uint8}
    again = nn.Parameter(weights[0].detach().clone())
    resumed = made(AdamW8bit, again)
    resumed.load_state_dict(copy.deepcopy(own.state_dict()))
    steps(own, weights[0], 2, seed=2)
    steps(resumed, again, 2, seed=2)
    assert torch.equal(again, weights[0])
