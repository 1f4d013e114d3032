"""Card of an evaluation: ``benchmark.json``, ``verdicts.csv`` and a page that opens from the disk, with right and wrong images."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

from umm_zoo.benchmarks.base import Verdict
from umm_zoo.benchmarks.results import Made, Results, Row
from umm_zoo.checkpoints.plain_files import strict_json, write_whole, writing
from umm_zoo.report.html import Markup, element, embedded, number, page, table, text

#: Rows on the page, of each of right and wrong; and the longest side of their images in pixels.
SHOWN, SIDE = 24, 224


def write_card(
    results: Results,
    about: Mapping[str, Any],
    rows: Sequence[Row],
    made: Mapping[str, Made],
    verdicts: Mapping[str, Verdict],
) -> None:
    """Write ``benchmark.json``, ``verdicts.csv`` and ``benchmark.html`` into the folder of the verdicts.

    Args:
        results: the folder.
        about: plain values: ``run``, ``benchmark``, ``headline``, ``scores``, ``interval``, ``warnings``, and what else is known.
        rows: all rows in order.
        made: what the run made, by row.
        verdicts: by row.
    """
    with writing(results.path, "a run folder that can be written"):
        write_whole(results.path / "benchmark.json", strict_json(about, indent=2, ensure_ascii=False) + "\n")
        write_whole(results.path / "verdicts.csv", _csv(results, rows, made, verdicts))
        write_whole(results.path / "benchmark.html", _page(results, about, rows, made, verdicts))


def _csv(results: Results, rows: Sequence[Row], made: Mapping[str, Made], verdicts: Mapping[str, Verdict]) -> str:
    """A line per row, further columns of the benchmark behind the common ones."""
    more = list(dict.fromkeys(chain.from_iterable(verdicts[row.id].columns for row in rows)))
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["key", "seed", "kind", "score", "reason", "text", "answer", "image", *more])
    for row in rows:
        verdict, own = verdicts[row.id], made[row.id]
        score = "" if math.isnan(verdict.score) else f"{verdict.score:g}"
        image = "" if own.file is None else f"../{results.images.name}/{own.file}"
        cells = [row.item.key, row.seed, verdict.kind, score, verdict.reason, row.item.text, own.answer or "", image]
        lines.writerow([*cells, *(_cell(verdict.columns.get(name)) for name in more)])
    return file.getvalue()


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else strict_json(value, ensure_ascii=False)


def _page(
    results: Results, about: Mapping[str, Any], rows: Sequence[Row], made: Mapping[str, Made], verdicts: Mapping[str, Verdict]
) -> str:
    title = f"{about['benchmark']} of {about['run']}"
    parts: list[Any] = [element("h1", title), *_headline(about), element("h2", "Scores"), table(about["scores"].items())]
    for name, own, some in _sections(rows, verdicts):
        if some:
            parts.append(element("h2", f"{name} ", element("span", f"({len(some)} of {own:,})", class_="faint")))
            cards = [_figure(results, row, made[row.id], verdicts[row.id]) for row in some]
            parts.append(element("div", *cards, class_="cards"))
    known = [[key, element("code", _plain(value))] for key, value in about.items() if key != "scores"]
    return page(title, *parts, element("h2", "How it was measured"), table(known))


def _headline(about: Mapping[str, Any]) -> Iterator[Markup]:
    name = about["headline"]
    score, ends = about["scores"].get(name, math.nan), about.get("interval")
    between = f"; 95 % interval over items {number(ends[0])} to {number(ends[1])}" if ends else ""
    headline = element("span", number(score), class_="headline")
    yield element("div", headline, " ", element("span", f"{name}{between}", class_="faint"))
    for warning in about.get("warnings", ()):
        yield element("p", warning, class_="warning")


def _sections(rows: Sequence[Row], verdicts: Mapping[str, Verdict]) -> Iterator[tuple[str, int, list[Row]]]:
    """(heading, how many there are, those that are shown): wrong and right, or where scores lie between, low and high."""
    scored = [row for row in rows if not math.isnan(verdicts[row.id].score)]
    if any(verdicts[row.id].score not in (0, 1) for row in scored):
        ordered = sorted(scored, key=lambda row: verdicts[row.id].score)
        half = (len(ordered) + 1) // 2
        yield "Lowest scores", len(ordered), ordered[: min(SHOWN, half)]
        yield "Highest scores", len(ordered), ordered[half:][-SHOWN:][::-1]
    else:
        wrong, right = ([row for row in scored if verdicts[row.id].score == score] for score in (0, 1))
        yield "Wrong", len(wrong), _spread(wrong, verdicts)
        yield "Right", len(right), _spread(right, verdicts)
    if left := [row for row in rows if math.isnan(verdicts[row.id].score)]:
        yield "Left out", len(left), _spread(left, verdicts)


def _spread(rows: Sequence[Row], verdicts: Mapping[str, Verdict]) -> list[Row]:
    """Some of the rows, of all kinds in turn."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(verdicts[row.id].kind, []).append(row)
    return [row for turn in zip_longest(*kinds.values()) for row in turn if row is not None][:SHOWN]


def _figure(results: Results, row: Row, made: Made, verdict: Verdict) -> Markup:
    files = [*row.item.images, *([] if made.file is None else [results.images / made.file])]
    images = [element("img", alt="", src=embedded(file, SIDE, SIDE)) for file in files]
    lines = [text(said) for said in (row.item.text, made.answer or "") if said]
    lines += [element("b", line) for line in verdict.reason.splitlines()]
    mark = "wrong" if verdict.score == 0 else "right" if verdict.score == 1 else ""
    lines += [] if mark or math.isnan(verdict.score) else [text(f"{verdict.score:.3g}")]
    lines += [element("span", f"{verdict.kind}, seed {row.seed}", class_="faint")] if verdict.kind else []
    return element("figure", *images, element("figcaption", Markup("<br>".join(lines))), class_=mark or None)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else strict_json(value, ensure_ascii=False)
