"""Means of named outputs against sums done by hand."""

import pytest
import torch

from umm_zoo.batch import Batch
from umm_zoo.metrics import Means


def batch(size: int) -> Batch:
    return Batch(keys=[f"s/0:{i}" for i in range(size)], conversations=[[] for _ in range(size)])


def test_a_scalar_without_a_count_weighs_as_much_as_its_batch_has_rows() -> None:
    metric = Means()
    metric.update({"loss": torch.tensor(1.0), "answers": ["a"], "nll": torch.ones(1)}, batch(1))
    metric.update({"loss": torch.tensor(5.0), "scale": 2.0}, batch(3))
    assert {name: float(value) for name, value in metric.compute().items()} == {"loss": (1 + 3 * 5) / 4, "scale": 2.0}


def test_counts_make_the_mean_independent_of_the_batches() -> None:
    rows = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    for cuts in ([5], [1, 4], [2, 2, 1]):
        metric = Means(["mark_accuracy"])
        for part in rows.split(cuts):
            metric.update(
                {"mark_accuracy": part.mean(), "loss": torch.tensor(9.0), "counts": {"mark_accuracy": len(part)}}, batch(7)
            )
        assert float(metric.compute()["mark_accuracy"]) == pytest.approx(3 / 5)
        assert list(metric.compute()) == ["mark_accuracy"]


def test_a_batch_with_nothing_to_average_is_left_out() -> None:
    metric = Means(["mark_accuracy"])
    metric.update({"mark_accuracy": torch.tensor(torch.nan), "counts": {"mark_accuracy": 0}}, batch(4))
    assert metric.compute() == {}
    metric.update({"mark_accuracy": torch.tensor(0.25), "counts": {"mark_accuracy": 8}}, batch(4))
    assert float(metric.compute()["mark_accuracy"]) == 0.25


def test_a_name_that_is_no_scalar_is_an_error() -> None:
    outputs = {"loss": torch.tensor(1.0), "nll": torch.ones(2)}
    for name in ("nll", "accuracy"):
        with pytest.raises(ValueError, match=f"must return the scalar '{name}', found \\['loss'\\]"):
            Means([name]).update(outputs, batch(2))
