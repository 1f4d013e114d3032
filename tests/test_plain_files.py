"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from umm_zoo.checkpoints.plain_files import strict_json


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def test_numbers_that_are_not_finite_become_null_with_a_reason() -> None:
    value = {
        "metrics": {"val/a": math.nan, "val/b": -math.inf, "val/c": 1.5},
        "rows": [{"x": math.inf}, {"x": 2}],
        "t": (math.nan,),
    }
    found = json.loads(strict_json(value), parse_constant=refuse)
    assert found["metrics"] == {"val/a": None, "val/b": None, "val/c": 1.5} and found["rows"] == [{"x": None}, {"x": 2}]
    assert found["not_finite"] == {"metrics.val/a": "nan", "metrics.val/b": "-inf", "rows.0.x": "inf", "t.0": "nan"}


@pytest.mark.parametrize("value", [{"a": 1.0}, [1, "NaN"], "Infinity", {"b": [None, True]}])
def test_everything_else_is_as_it_was(value: Any) -> None:
    assert json.loads(strict_json(value, indent=2), parse_constant=refuse) == value
    assert strict_json([math.nan, [math.inf]]) == "[null, [null]]"
