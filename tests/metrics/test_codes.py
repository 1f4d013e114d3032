"""Use of codes, from counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.metrics import CodeUsage
from umm_zoo.outputs import Outputs


def rows(count: int) -> Batch:
    return Batch([f"row{i}" for i in range(count)], [[] for _ in range(count)])


def test_use_of_two_tables():
    metric = CodeUsage(num_codes=4, codes_per_token=2)
    first = [torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1, 1]])]  # rows of unequal sizes
    for codes in (first, [torch.tensor([[1, 1]])]):
        metric.update(Outputs(codes=codes), rows(len(codes)))
    # the first code is 0, 0, 1, 1 and the second always 1
    expected = {"usage": (2 / 4 + 1 / 4) / 2, "dead": 5, "perplexity": (2 + 1) / 2, "bits": 1.0}
    assert_close({name: float(value) for name, value in metric.compute().items()}, {k: float(v) for k, v in expected.items()})


def test_no_code_gives_no_value():
    assert CodeUsage(4).compute() == {}


@pytest.mark.parametrize("codes", [torch.tensor([[4]]), torch.tensor([[0, 1]])], ids=["too large", "two of them"])
def test_codes_of_another_table_are_refused(codes: torch.Tensor):
    with pytest.raises(UserError, match="expected"):
        CodeUsage(num_codes=4).update(Outputs(codes=[codes]), rows(1))
