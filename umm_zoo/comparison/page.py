"""Page of a comparison: question, rule, intervals, differences, costs, and a row of samples of every choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umm_zoo.checkpoints.plain_files import write_whole
from umm_zoo.comparison.results import DIFFERENCES, VERDICTS, Results
from umm_zoo.comparison.rule import BEFORE
from umm_zoo.comparison.statistics import interval
from umm_zoo.errors import UserError
from umm_zoo.report.html import Markup, command, element, embedded_if_sound, number, page, table
from umm_zoo.report.run_files import RunFiles

#: Sizes of a plot of intervals in pixels: of the names, of the values, of a line.
NAMES, VALUES, LINE = 190, 330, 24

#: Bytes that the samples of all choices may take together.
ROOM = 2_000_000


def write_comparison_page(results: Results, file: Path, runs: Path = Path("runs")) -> Path:
    """Write the page of a comparison, whole or not at all; returns its path."""
    write_whole(file, comparison_page(results, runs))
    return file


def comparison_page(results: Results, runs: Path = Path("runs")) -> str:
    """The page of a comparison.

    Args:
        results: its rows.
        runs: folder of the run folders; where they are, the samples of each choice are shown.
    """
    parts: list[Any] = [element("h1", results.name), element("p", results.question.strip())]
    if results.decision:
        status = str(results.provenance.get("rule", ""))
        parts += [element("h2", "Rule"), element("p", results.decision.strip())]
        parts += [element("p", status, class_="faint" if status == BEFORE else "warning")] if status else []
    if results.differences():
        head, rows = results.verdict_table()
        marked = [
            [name, *(element("span", word, class_=f"verdict {word.replace(' ', '-')}") for word in words)] for name, *words in rows
        ]
        parts += [element("h2", "Verdicts"), table(marked, head), element("p", VERDICTS, class_="faint")]
    parts += [element("h2", "Intervals"), element("p", "Mean and 95 % interval over seeds; ticks are single runs.", class_="faint")]
    parts += [element("div", *(_plot(results, metric) for metric in results.metrics), class_="charts")]
    parts += [_titled(*results.mean_table(), "Means ± half-width of the 95 % interval (Student's t)")]
    if results.unfinished:
        parts += [element("p", f"{run.choice}, seed {run.seed}: {run}", class_="warning") for run in results.unfinished]
    if results.differences():
        first = results.choices()[0]
        parts += [element("h2", "Paired differences"), element("p", DIFFERENCES.format(first=f"“{first}”"), class_="faint")]
        head, rows = results.difference_table()
        parts += [table(rows, head)]
    if costs := results.cost_table():
        parts += [_titled(*costs, "Costs")]
    if samples := list(_samples(results, runs)):
        parts += [element("h2", "Samples"), *samples]
    known = results.provenance
    parts += [element("h2", "Made with"), command(str(known.get("command", "")))]
    parts += [
        table(
            [[key, str(value)] for key, value in known.items() if key not in ("command", "rule")]
            + [["compare file", results.source]]
        )
    ]
    return page(results.name, *parts, scripts=["page.js"])


def _titled(head: list[str], rows: list[list[str]], title: str) -> Markup:
    return Markup(element("h2", title) + table(rows, head))


def _plot(results: Results, metric: str) -> Markup:
    """Intervals of every choice on one axis."""
    values = {choice: list(results.of(choice, metric).values()) for choice in results.choices()}
    values = {choice: own for choice, own in values.items() if own}
    title = results.title(metric)
    if not values:
        return Markup("")
    means = {choice: interval(own) for choice, own in values.items()}
    halves = {choice: 0.0 if math.isnan(mean.half) else mean.half for choice, mean in means.items()}
    ends = [
        end for choice, mean in means.items() for end in (mean.mean - halves[choice], mean.mean + halves[choice], *values[choice])
    ]
    low, high = min(ends), max(ends)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def x(value: float) -> str:
        return f"{NAMES + (value - low) / (high - low) * VALUES:.1f}"

    lines = []
    for place, (choice, mean) in enumerate(means.items()):
        y, colour = LINE * place + LINE / 2, f"var(--c{place % 8})"
        lines.append(element("text", shortened(choice), x=NAMES - 8, y=y + 4, text_anchor="end", style="fill: var(--ink)"))
        span = {"x1": x(mean.mean - halves[choice]), "x2": x(mean.mean + halves[choice])}
        lines.append(element("line", y1=y, y2=y, style=f"stroke: {colour}; stroke-width: 2", **span))
        lines += [element("line", x1=x(v), x2=x(v), y1=y - 7, y2=y - 3, style=f"stroke: {colour}") for v in values[choice]]
        told = element("title", f"{choice}: {mean}")
        lines.append(element("circle", told, cx=x(mean.mean), cy=y, r=4, style=f"fill: {colour}"))
    bottom = LINE * len(means)
    axis = [
        element("text", number(end), x=x(end), y=bottom + 14, text_anchor=side) for end, side in ((low, "start"), (high, "end"))
    ]
    size = f"0 0 {NAMES + VALUES} {bottom + 18}"
    plot = element("svg", *lines, *axis, viewBox=size, role="img", style="height: auto; cursor: default", aria_label=title)
    return element("div", element("h3", title), plot, class_="chart")


def shortened(name: str, most: int = 28) -> str:
    """A name that fits beside a plot."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _samples(results: Results, runs: Path) -> Iterator[Markup]:
    """The last sample grid of every choice, of its first seed, where its run folder is here."""
    found: dict[str, Path] = {}
    for row in sorted(results.rows, key=lambda row: row.seed):
        try:
            grids = RunFiles.read(runs / row.run).samples
        except UserError:
            continue
        if grids:
            found.setdefault(row.choice, grids[-1][1])
    room = ROOM
    for choice in results.choices():
        address = embedded_if_sound(found[choice], 1200) if choice in found else None
        if address is not None and (room := room - len(address)) > 0:
            yield element("div", element("h3", choice), element("img", src=address, alt=choice), class_="samples")
