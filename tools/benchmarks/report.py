"""Table of what the arms took, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tools.benchmarks.base import Numbers
from tools.benchmarks.turn import benchmark
from tools.benchmarks.turns import Arm
from umm_zoo.release.card import markdown_table

#: Columns of their own; what else an arm counts stands in the last one.
USUAL = ("seconds", "memory", "gflop")


def page(title: str, arms: Sequence[Arm], machine: Numbers, where: dict[str, Any]) -> str:
    """The whole report."""
    parts = [
        f"# {title}",
        "",
        "Medians over the turns; ratios are to the first arm of a setting, in the same turn (more is slower).",
    ]
    parts += ["", f"Machine: {where['machine']}, commit {where['commit']}, load {where['load']:.1f}."]
    if machine:
        does = f"{machine['gflops']:.0f} GFLOP/s in matrix products, {machine['gbytes']:.1f} GB/s copied"
        parts += [f"One core does {does}, {machine['pil']:.0f} JPEGs of 256 px per second by PIL."]
    for name in dict.fromkeys(arm.benchmark for arm in arms):
        own = [arm for arm in arms if arm.benchmark == name]
        doc = (benchmark(name).__doc__ or "").strip().splitlines()[0]
        parts += ["", f"## {name}", "", doc, "", *table(own, machine), *left_out(own)]
    return "\n".join(parts) + "\n"


def table(arms: Sequence[Arm], machine: Numbers) -> list[str]:
    """A line for every arm that ran."""
    unit = benchmark(arms[0].benchmark).UNIT
    head = ["setting", "arm", f"ms per {unit}", "ratio", "from - to", "MiB", "ratio", "of the product rate", "also"]
    rows = []
    for arm in arms:
        if not arm.turns:
            continue
        first = next(one for one in arms if one.setting == arm.setting and one.turns)
        took = ratios(arm, first, "seconds")
        cells = [arm.setting, arm.label, number(1000 * median(arm, "seconds")), f"{statistics.median(took):.2f}"]
        cells.append(f"{min(took):.2f} - {max(took):.2f}")
        has = "memory" in arm.turns[0]
        cells.append(f"{median(arm, 'memory'):.0f}" if has else "")
        cells.append(f"{statistics.median(ratios(arm, first, 'memory')):.2f}" if has else "")
        counted = "gflop" in arm.turns[0] and machine
        cells.append(f"{median(arm, 'gflop') / median(arm, 'seconds') / machine['gflops']:.0%}" if counted else "")
        more = [name for name in arm.turns[0] if name not in USUAL]
        cells.append(", ".join(f"{name} {number(median(arm, name))}" for name in more))
        rows.append(cells)
    used = [place for place in range(len(head)) if any(row[place] for row in rows)]
    return markdown_table([head[place] for place in used], [[row[place] for place in used] for row in rows])


def left_out(arms: Sequence[Arm]) -> list[str]:
    """Arms that did not run, and why."""
    reasons = {arm.label: arm.left_out for arm in arms if arm.left_out}
    return ["", *(f"Left out: {label} ({reason})." for label, reason in reasons.items())] if reasons else []


def median(arm: Arm, name: str) -> float:
    """Of the turns."""
    return statistics.median(turn[name] for turn in arm.turns)


def ratios(arm: Arm, first: Arm, name: str) -> list[float]:
    """To the first arm's, turn by turn."""
    return [own[name] / max(theirs[name], 1e-9) for own, theirs in zip(arm.turns, first.turns, strict=False)]


def number(value: float) -> str:
    """Three figures, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
