"""Curves of one run or several, as plain values for the page's script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umm_zoo.report.html import Markup, data, element
from umm_zoo.report.run_files import Curve, RunFiles

#: Points of a curve that are kept; of more, the lowest and the highest of each stretch.
POINTS = 400

#: Names that are shown in a section of their own.
ASIDE = ("throughput/", "val/attention/")


def charts_of_run(run: RunFiles) -> list[dict[str, Any]]:
    """A chart per group of names: losses, one per metric, one per further prefix."""
    groups: dict[str, list[str]] = {}
    for name in _names([run]):
        groups.setdefault(_group(name), []).append(name)
    return [_chart(group, {_within(name, group): run.curves[name] for name in names}) for group, names in groups.items()]


def charts_of_runs(runs: Sequence[RunFiles], labels: Sequence[str]) -> list[dict[str, Any]]:
    """A chart per name, the runs' curves over each other."""
    lines = list(zip(labels, runs, strict=True))
    return [_chart(name, {label: run.curves[name] for label, run in lines if name in run.curves}) for name in _names(runs)]


def shown(charts: Sequence[Mapping[str, Any]]) -> Markup:
    """The places of the charts and their values."""
    places = [element("div", class_="chart", data_chart=number) for number in range(len(charts))]
    return Markup(element("div", *places, class_="charts") + data(list(charts), "charts"))


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Logged names: losses first, then scores."""
    names = {name for run in runs for name, curve in run.curves.items() if len(curve) > 1}  # a single value stands among the scores
    order = {"train": 0, "val": 1}
    aside = {name for run in runs for name in run.references}
    kept = [name for name in names if not name.startswith(ASIDE) and name not in aside]
    return sorted(kept, key=lambda name: (order.get(name.partition("/")[0], 2), name.split("/")))


def _group(name: str) -> str:
    """Losses of training have a chart each, for their scales differ; scores of one metric share one."""
    parts = name.split("/")
    return name if len(parts) < 3 else "/".join(parts[:2])


def _within(name: str, group: str) -> str:
    return name.removeprefix(group).lstrip("/") or name


def _chart(title: str, curves: Mapping[str, Curve]) -> dict[str, Any]:
    return {"title": title, "series": [{"name": name, "points": thinned(curve)} for name, curve in curves.items()]}


def thinned(curve: Curve, points: int = POINTS) -> list[list[float]]:
    """At most ``points`` points that keep every extreme: of each stretch of steps its lowest and its highest, and the last one.

    Values that are no finite number are left out; four digits are kept.
    """
    finite = [(step, value) for step, value in curve if abs(value) < float("inf")]
    if len(finite) > points:
        length = -(-len(finite) // max(1, (points - 1) // 2))
        stretches = [finite[start : start + length] for start in range(0, len(finite), length)]
        ends = [{min(own, key=lambda p: p[1]), max(own, key=lambda p: p[1])} for own in stretches]
        finite = sorted({point for pair in ends for point in pair} | {finite[-1]})
    return [[step, float(f"{value:.5g}")] for step, value in finite]
