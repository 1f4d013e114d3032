"""Means of named scalars against sums done by hand."""

import pytest
import torch

from umm_zoo.batch import Batch
from umm_zoo.metrics import AttentionBias, Means
from umm_zoo.outputs import Outputs, QueryAttention


def batch(size: int) -> Batch:
    return Batch(keys=[f"s/0:{i}" for i in range(size)], conversations=[[] for _ in range(size)])


def test_a_scalar_without_a_count_weighs_as_much_as_its_batch_has_rows() -> None:
    metric = Means()
    metric.update(Outputs({"loss": torch.tensor(1.0)}, answers=["a"], nll=torch.ones(1)), batch(1))
    metric.update(Outputs({"loss": torch.tensor(5.0), "scale": torch.tensor(2.0)}), batch(3))
    assert {name: float(value) for name, value in metric.compute().items()} == {"loss": (1 + 3 * 5) / 4, "scale": 2.0}


def test_counts_make_the_mean_independent_of_the_batches() -> None:
    rows = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    for cuts in ([5], [1, 4], [2, 2, 1]):
        metric = Means(["mark_accuracy"])
        for part in rows.split(cuts):
            scalars = {"mark_accuracy": part.mean(), "loss": torch.tensor(9.0)}
            metric.update(Outputs(scalars, {"mark_accuracy": len(part)}), batch(7))
        assert float(metric.compute()["mark_accuracy"]) == pytest.approx(3 / 5)
        assert list(metric.compute()) == ["mark_accuracy"]


def test_a_batch_with_nothing_to_average_is_left_out() -> None:
    metric = Means(["mark_accuracy"])
    metric.update(Outputs({"mark_accuracy": torch.tensor(torch.nan)}, {"mark_accuracy": 0}), batch(4))
    assert metric.compute() == {}
    metric.update(Outputs({"mark_accuracy": torch.tensor(0.25)}, {"mark_accuracy": 8}), batch(4))
    assert float(metric.compute()["mark_accuracy"]) == 0.25


def test_a_name_that_is_no_scalar_is_an_error() -> None:
    outputs = Outputs({"loss": torch.tensor(1.0)}, nll=torch.ones(2))
    for name in ("nll", "accuracy"):
        with pytest.raises(ValueError, match=rf"Means: found the scalars \['loss'\], expected '{name}'"):
            Means([name]).update(outputs, batch(2))


def test_attention_is_averaged_over_the_rows_in_which_it_was_measured() -> None:
    metric = AttentionBias()
    for bias, rows in ((0.5, 3), (2.0, 1), (torch.nan, 0)):
        metric.update(Outputs(attention=QueryAttention(torch.tensor(bias), torch.tensor(-bias), rows)), batch(4))
    metric.update(Outputs({"loss": torch.tensor(1.0)}), batch(4))
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "attention_bias": (3 * 0.5 + 2.0) / 4,
        "attention_log_bias": -(3 * 0.5 + 2.0) / 4,
    }


def test_what_is_read_is_what_is_named() -> None:
    assert Means(["loss", "flow"]).reads == ("loss", "flow") and Means().reads == () and AttentionBias().reads == ("attention",)
