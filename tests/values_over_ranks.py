"""Values of metrics over one process and over two, for tests that compare them."""

from collections.abc import Callable

import pytest
from ranks import on_two_ranks
from torchmetrics import Metric

from umm_zoo.batch import Batch
from umm_zoo.callbacks.metrics import logged
from umm_zoo.outputs import Outputs

#: The given rows of a fixed set, and what a model makes of them.
Step = Callable[[range], tuple[Outputs, Batch]]
MakeMetrics = Callable[[], dict[str, Metric]]


def scored(metric: Metric, *steps: tuple[Outputs, Batch]) -> dict[str, float]:
    """The values of a metric after these steps; that of a metric of one number is called "" here."""
    for outputs, batch in steps:
        metric.update(outputs, batch)
    return logged("", "", metric.compute())


def values_of(make: MakeMetrics, step: Step, rows: range, batch_size: int = 3) -> dict[str, float]:
    """Every metric over the rows, batch by batch; over all ranks where there are several."""
    values: dict[str, float] = {}
    for name, metric in make().items():
        steps = (step(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
        values |= {f"{name}/{entry}": value for entry, value in scored(metric, *steps).items()}
    return values


def check_every_rank(make: MakeMetrics, step: Step, splits: dict[str, list[range]], num_rows: int) -> dict[str, float]:
    """Assert that each rank has the values of one process over all rows, and return these."""
    expected = values_of(make, step, range(num_rows))
    for found in (values for by_split in values_by_rank(make, step, splits) for values in by_split.values()):
        assert found == pytest.approx(expected, abs=1e-6)
        assert list(found) == list(expected)  # ranks that log in another order would wait for each other
    return expected


def values_by_rank(make: MakeMetrics, step: Step, splits: dict[str, list[range]]) -> list[dict[str, dict[str, float]]]:
    """Of two processes, the rows of each split shared out between them."""
    return on_two_ranks(lambda rank: {name: values_of(make, step, split[rank]) for name, split in splits.items()})
