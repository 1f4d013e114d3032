"""``check_block`` passes good blocks and says what is wrong with the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from umm_zoo.batch import Grid, Tokens
from umm_zoo.testing import check_block


class Good(nn.Module):
    """A projection of tokens, with a dropout that evaluation switches off."""

    def __init__(self, in_dim: int = 6, out_dim: int = 5) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(in_dim, out_dim), nn.Dropout(0.5)

    def forward(self, tokens: Tokens, grid: Grid) -> Tokens:
        return Tokens(self.dropout(self.linear(tokens.values)), tokens.mask)

    def example_inputs(self) -> tuple[Tokens, Grid]:
        return Tokens(torch.randn(2, 12, self.linear.in_features), torch.ones(2, 12, dtype=torch.bool)), Grid(3, 4)


class Undocumented(Good):
    pass


class Swallowing(Good):
    """Takes anything."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


class Noisy(Good):
    """Draws in evaluation mode."""

    def forward(self, tokens: Tokens, grid: Grid) -> Tokens:
        return Tokens(self.linear(tokens.values) + torch.randn(()).to(tokens.values))


class Idle(Good):
    """Has a parameter that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))


class Infinite(Good):
    """Divides by zero."""

    def forward(self, tokens: Tokens, grid: Grid) -> Tokens:
        return Tokens(self.linear(tokens.values) / 0)


class Single(Good):
    """Insists on float32 inside."""

    def forward(self, tokens: Tokens, grid: Grid) -> Tokens:
        return Tokens(self.linear(tokens.values).float())


class Constant32(Good):
    """Makes its own float32 tensor."""

    def forward(self, tokens: Tokens, grid: Grid) -> Tokens:
        return Tokens(self.linear(tokens.values + torch.zeros(6, 6)[0]) @ torch.eye(5))


class Counting(Good):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, tokens: Tokens, grid: Grid) -> Tokens:
        self.calls += 1
        return Tokens(self.linear(tokens.values))


class Sharing(Good):
    """Copies itself without its parameters."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharing:
        return self


def test_good_block_passes_and_is_left_as_it_was() -> None:
    block = Good().train()
    state, drawn = {key: value.clone() for key, value in block.state_dict().items()}, torch.get_rng_state()
    check_block(block, block.example_inputs(), output_shape=(2, 12, 5))
    assert block.training and block.dropout.training and block.linear.weight.grad is None
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    assert not torch.equal(drawn, torch.get_rng_state())  # example_inputs drew; check_block itself did not:
    drawn = torch.get_rng_state()
    check_block(block, (Tokens(torch.ones(1, 2, 6)), Grid(1, 2)))
    assert torch.equal(drawn, torch.get_rng_state())


def test_block_may_bring_its_own_inputs() -> None:
    check_block(Good())
    with pytest.raises(AssertionError, match="Linear: expected inputs, or a block with a method example_inputs"):
        check_block(nn.Linear(2, 3))


def test_random_block_passes_when_that_is_said() -> None:
    check_block(Noisy(), random=True)


def test_idle_parameter_passes_when_that_is_said() -> None:
    check_block(Idle(), unused=["idle"])
    frozen = Idle()
    frozen.idle.requires_grad_(False)
    check_block(frozen)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Undocumented(), "Undocumented: expected a docstring"),
        (Swallowing(), r"Swallowing: expected a constructor that names its arguments, found \*\*kwargs"),
        (Noisy(), "Noisy: expected the same output twice in evaluation mode"),
        (Idle(), "Idle: expected a gradient for 'idle', found none"),
        (Infinite(), "Infinite: expected finite outputs, found 120 that are not"),
        (Single(), "Single: expected an output of torch.float64 for weights and inputs of torch.float64, found torch.float32"),
        (Constant32(), "Constant32: expected a forward pass in torch.float64, found expected m1 and m2 to have the same dtype"),
        (Counting(), "Counting: expected evaluation to change nothing, found another 'calls'"),
        (Sharing(), "Sharing: expected a deepcopy to share nothing, found 2 tensors in both"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_fault_is_named(block: nn.Module, expected: str) -> None:
    with pytest.raises(AssertionError, match=expected):
        check_block(block)


def test_shape_is_compared() -> None:
    with pytest.raises(AssertionError, match=r"Good: expected an output of shape \[2, 12, 7\], found \[2, 12, 5\]"):
        check_block(Good(), output_shape=(2, 12, 7))


def test_plain_tensors_and_maps_are_inputs() -> None:
    class Add(nn.Module):
        """Adds what a map holds."""

        def forward(self, x: Tensor, more: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return x + more["y"], x

    check_block(Add(), (torch.randn(2, 3), {"y": torch.randn(3)}), output_shape=(2, 3))
