"""Outputs of a validation: images are lists of rows, and groups of rows are put together again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.batch import Batch
from umm_zoo.metrics import Means
from umm_zoo.outputs import Outputs, QueryAttention, in_groups


def rows(count: int) -> Batch:
    return Batch([f"row{row}" for row in range(count)], [[] for _ in range(count)], meta=[{"value": row} for row in range(count)])


def values(batch: Batch) -> list[float]:
    return [float(meta["value"]) for meta in batch.meta]


def image(value: float) -> Tensor:
    return torch.full((3, 2, 2 + int(value) % 2), value)


def step(batch: Batch) -> Outputs:
    own = values(batch)
    positive = [value for value in own if value]
    return Outputs(
        {"mean": torch.tensor(own).mean(), "of_positive": torch.tensor(positive).sum() / max(1, len(positive))},
        {"of_positive": len(positive)},
        answers=[str(value) for value in own],
        nll=torch.tensor(own),
        generated=[image(value) for value in own],
        attention=QueryAttention(torch.tensor(own).mean(), -torch.tensor(own).mean(), len(own)),
        columns={"original": [image(value) for value in own]},
        unchanged=[image(0)] * len(own) if 0.0 in own else None,
    )


def test_a_stack_is_taken_apart() -> None:
    made = Outputs(generated=torch.rand(2, 3, 4, 5), columns={"one": torch.rand(2, 3, 4, 5)})
    assert isinstance(made.generated, list) and made.generated[1].shape == (3, 4, 5) and isinstance(made.columns["one"], list)


def test_groups_stand_in_the_order_of_the_rows_and_their_means_are_those_of_all() -> None:
    batch = rows(5)
    found, whole = in_groups(step, batch, [row % 2 for row in range(5)]), step(batch)
    assert found.answers == whole.answers and torch.equal(found.nll, whole.nll)
    for one, two in zip(
        [*found.generated, *found.columns["original"]], [*whole.generated, *whole.columns["original"]], strict=True
    ):
        assert torch.equal(one, two)
    assert_close(found.scalars, whole.scalars)
    assert found.counts == whole.counts == {"of_positive": 4}
    assert_close(found.attention.bias, whole.attention.bias)
    assert found.attention.num_rows == 5
    assert found.unchanged is None and found.round_trips is None  # a group lacks it


def test_a_scalar_that_a_group_lacks_counts_the_rows_that_have_it() -> None:
    def some(batch: Batch) -> Outputs:
        return Outputs({"mean": torch.tensor(values(batch)).mean()} if len(batch) > 1 else {"other": torch.tensor(7.0)})

    batch = rows(4)
    found = in_groups(some, batch, [0, 0, 1, 0])
    metric = Means()
    metric.update(found, batch)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx({"mean": 4 / 3, "other": 7.0})
    assert found.counts == {"mean": 3, "other": 1}


def test_one_group_is_the_step_itself() -> None:
    batch = rows(3)
    made = step(batch)
    assert in_groups(lambda _: made, batch, [1, 1, 1]) is made and in_groups(lambda _: made, batch, []) is made
