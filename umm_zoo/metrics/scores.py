"""Names under which the scores of a run's metrics are logged, before any of them is computed."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping

from torchmetrics import Metric

from umm_zoo.errors import nearest

#: How near a name must come to one that a metric always gives to be taken for that one misspelt, where the data gives others.
_MISSPELT = 0.8


def names_of(metric: Metric) -> tuple[str, ...] | None:
    """Names of the values that a metric gives: one empty name for a single value, ``*`` for such as the data decides.

    What a metric does not say itself (``RowMetric.scores``) its hints tell; None where they do not.
    """
    if (stated := getattr(metric, "scores", None)) is not None:
        return tuple(stated)
    for function in ("compute", "values_of"):
        try:
            returned = typing.get_type_hints(getattr(type(metric), function, lambda: None)).get("return")
        except (NameError, TypeError):
            continue
        kind = typing.get_origin(returned) or returned
        if isinstance(kind, type) and issubclass(kind, Mapping):
            return ("*",)
        if isinstance(kind, type) and kind.__name__ in ("Tensor", "float"):
            return ("",)
    return None


def logged_names(metrics: Mapping[str, Metric | None]) -> list[str]:
    """Every name below the prefix that the metrics may log, ``NAME/*`` where it is not known which."""
    return [
        f"{name}/{entry}".rstrip("/")
        for name, metric in metrics.items()
        for entry in ((None if metric is None else names_of(metric)) or ("*",))
    ]


def unknown_score(score: str, metrics: Mapping[str, Metric | None]) -> str | None:
    """The name that is meant (or an empty one) where no metric gives a score of that name; None where one does, or may.

    Args:
        score: without the prefix, ``accuracy/overall``.
        metrics: by name; None is one about which nothing is known.
    """
    known = logged_names(metrics)
    for name, metric in metrics.items():
        if score != name and not score.startswith(f"{name}/"):
            continue
        entry, names = score.removeprefix(name).removeprefix("/"), None if metric is None else names_of(metric)
        if names is None or entry in names:
            return None
        near = difflib.get_close_matches(entry, [fixed for fixed in names if fixed != "*"], n=1, cutoff=_MISSPELT)
        if "*" in names and entry and not near:
            return None
        return f"{name}/{near[0]}" if near else nearest(score, known) or ""
    return nearest(score, known) or ""
