"""Means of named scalars against sums done by hand."""

import pytest
import torch
from values_over_ranks import scored

from umm_zoo.batch import Batch
from umm_zoo.metrics import AttentionBias, Means
from umm_zoo.outputs import Outputs, QueryAttention


def batch(size: int) -> Batch:
    return Batch(keys=[f"s/0:{i}" for i in range(size)], conversations=[[] for _ in range(size)])


def test_a_scalar_without_a_count_weighs_as_much_as_its_batch_has_rows() -> None:
    first = Outputs({"loss": torch.tensor(1.0)}, answers=["a"], nll=torch.ones(1)), batch(1)
    second = Outputs({"loss": torch.tensor(5.0), "scale": torch.tensor(2.0)}), batch(3)
    assert scored(Means(), first, second) == {"loss": (1 + 3 * 5) / 4, "scale": 2.0}


def test_counts_make_the_mean_independent_of_the_batches() -> None:
    rows = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    for cuts in ([5], [1, 4], [2, 2, 1]):
        scalars = [{"mark_accuracy": part.mean(), "loss": torch.tensor(9.0)} for part in rows.split(cuts)]
        steps = [(Outputs(s, {"mark_accuracy": count}), batch(7)) for s, count in zip(scalars, cuts, strict=True)]
        assert scored(Means(["mark_accuracy"]), *steps) == pytest.approx({"mark_accuracy": 3 / 5})


def test_a_batch_with_nothing_to_average_is_left_out() -> None:
    metric = Means(["mark_accuracy"])
    assert scored(metric, (Outputs({"mark_accuracy": torch.tensor(torch.nan)}, {"mark_accuracy": 0}), batch(4))) == {}
    step = Outputs({"mark_accuracy": torch.tensor(0.25)}, {"mark_accuracy": 8}), batch(4)
    assert scored(metric, step) == {"mark_accuracy": 0.25}


def test_a_name_that_is_no_scalar_is_an_error() -> None:
    outputs = Outputs({"loss": torch.tensor(1.0)}, nll=torch.ones(2))
    for name in ("nll", "accuracy"):
        with pytest.raises(ValueError, match=rf"Means: found the scalars \['loss'\], expected '{name}'"):
            Means([name]).update(outputs, batch(2))


def test_attention_is_averaged_over_the_rows_in_which_it_was_measured() -> None:
    seen = [QueryAttention(torch.tensor(bias), torch.tensor(-bias), rows) for bias, rows in ((0.5, 3), (2.0, 1), (torch.nan, 0))]
    outputs = [*(Outputs(attention=attention) for attention in seen), Outputs({"loss": torch.tensor(1.0)})]
    mean = (3 * 0.5 + 2.0) / 4
    expected = {"attention_bias": mean, "attention_log_bias": -mean}
    assert scored(AttentionBias(), *((one, batch(4)) for one in outputs)) == expected


def test_what_is_read_is_what_is_named() -> None:
    assert Means(["loss", "flow"]).reads == ("loss", "flow") and Means().reads == () and AttentionBias().reads == ("attention",)
