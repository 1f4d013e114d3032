"""Report of a conversion: counts of rows that add up, as JSON and as tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from itertools import count as numbers_from
from pathlib import Path
from typing import Any

from umm_zoo.errors import printable

REPORT_FILE = "report.json"
_LISTED = 5


def entry_of(
    samples: int = 0,
    converted: int = 0,
    kinds: Mapping[str, int] | None = None,
    left_out: Mapping[str, str] | None = None,
    notes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What ``conversion.json`` says of a shard: its samples, the rows that became some, and those that did not, with the reason."""
    kinds = dict(sorted((kinds or {}).items()))
    return {
        "samples": samples,
        "converted": converted,
        "kinds": kinds,
        "left_out": dict(left_out or {}),
        "notes": dict(notes or {}),
    }


def count_rows(
    written: Sequence[tuple[str, dict[str, Any]]], expected: Mapping[str, int | None], not_chosen: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """The outcome in numbers, by the part and the entry of each shard, those of a stopped run included.

    Of each part ``rows`` are ``converted`` and ``left_out_rows``; all of the latter together are ``left_out``, by ``reasons``.

    Args:
        expected: rows of a part that need an entry; None where only reading tells.
        not_chosen: rows of a part that no shard knows of, by reason.

    Raises:
        RuntimeError: rows were lost or counted twice.
    """
    names = ("converted", "left_out_rows", "samples", "shards")
    counts = {name: Counter[str]() for name in names}
    kinds, notes, reasons = Counter[str](), Counter[str](), Counter[str]()
    items: dict[str, str] = {}
    for part, entry in written:
        numbers = (entry["converted"], len(entry["left_out"]), entry["samples"], bool(entry["samples"]))
        for name, number in zip(names, numbers, strict=True):
            counts[name][part] += number
        kinds.update(entry["kinds"])
        notes.update(entry["notes"])
        reasons.update(re.split(r": | \(", reason, maxsplit=1)[0] for reason in entry["left_out"].values())
        for label, reason in entry["left_out"].items():  # a photo of two parts, or a row's label in two shards, is two rows
            items[label if label not in items else _another(f"{part}: {label}", items)] = reason
    for part, number in expected.items():
        found = counts["converted"][part] + counts["left_out_rows"][part]
        if number is not None and found != number:
            raise RuntimeError(f"{part}: {number} rows, of which {found} became samples or have a reason")
    for part, others in not_chosen.items():
        counts["left_out_rows"][part] += sum(others.values())
        reasons.update(others)
    parts = dict.fromkeys([*expected, *(part for part, _ in written)])
    rows = Counter({part: counts["converted"][part] + counts["left_out_rows"][part] for part in parts})
    made = {"rows": rows, **counts, "kinds": kinds, "notes": notes, "left_out": reasons.total()}
    return {**made, "reasons": dict(reasons.most_common()), "left_out_items": items}


def _another(label: str, items: Container[str]) -> str:
    """A label that is not taken yet."""
    names = (label if number == 1 else f"{label} ({number})" for number in numbers_from(1))
    return next(name for name in names if name not in items)


def print_report(title: str, report: dict[str, Any], place: Path) -> None:
    """Tables of the rows by part and by reason; ``place`` is the file that names what was left out."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False, markup=False)
    columns = ("shards", "rows", "converted", "samples", "left_out_rows")
    table = Table(
        "part",
        *(Column(name.replace("_rows", "").replace("_", " "), justify="right") for name in columns),
        title=printable(title),
    )
    for part in report["rows"]:
        table.add_row(printable(part), *(f"{report[name][part]:,}" for name in columns))
    console.print(table)
    kinds = ", ".join(f"{kind or 'none'} {count:,}" for kind, count in sorted(report["kinds"].items()))
    console.print(printable(f"kinds: {kinds}"))
    for what, count in sorted(report["notes"].items()):
        console.print(f"{count:,} x {what}")
    if report["left_out"]:
        table = Table("left out because", Column("rows", justify="right"))
        for reason, count in report["reasons"].items():
            table.add_row(reason, f"{count:,}")
        console.print(table)
        named = len(report["left_out_items"])
        each = "each" if named == report["left_out"] else f"{named:,} of them by name"
        console.print(printable(f"left out: {report['left_out']:,} ({each} with its reason in {place})"), soft_wrap=True)
        for name, reason in list(report["left_out_items"].items())[:_LISTED]:
            console.print(f"  {name}: {reason}", soft_wrap=True)
