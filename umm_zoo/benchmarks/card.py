"""Card of an evaluation: ``benchmark.json``, ``verdicts.csv`` and a page that opens from the disk, with right and wrong images."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from umm_zoo.benchmarks.base import Verdict
from umm_zoo.benchmarks.results import Made, Results, Row
from umm_zoo.checkpoints.plain_files import strict_json, write_whole, writing
from umm_zoo.errors import printable
from umm_zoo.generation.images import open_image

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
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["key", "seed", "kind", "score", "reason", "text", "answer", "image", *more])
    for row in rows:
        verdict, own = verdicts[row.id], made[row.id]
        score = "" if math.isnan(verdict.score) else f"{verdict.score:g}"
        file = "" if own.file is None else f"../{results.images.name}/{own.file}"
        cells = [row.item.key, row.seed, verdict.kind, score, verdict.reason, row.item.text, own.answer or "", file]
        table.writerow([*cells, *(_cell(verdict.columns.get(name)) for name in more)])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else strict_json(value, ensure_ascii=False)


def _page(
    results: Results, about: Mapping[str, Any], rows: Sequence[Row], made: Mapping[str, Made], verdicts: Mapping[str, Verdict]
) -> str:
    title = f"{about['benchmark']} of {about['run']}"
    parts = [f"<h1>{_text(title)}</h1>", *_headline(about), "<h2>Scores</h2>", _scores(about["scores"])]
    for name, own, some in _sections(rows, verdicts):
        cards = "".join(_figure(results, row, made[row.id], verdicts[row.id]) for row in some)
        heading = f'<h2>{name} <span class="faint">({len(some)} of {own:,})</span></h2>'
        parts += [heading, f'<div class="cards">{cards}</div>'] if some else []
    parts += ["<h2>How it was measured</h2>", _table({key: value for key, value in about.items() if key not in ("scores",)})]
    style = Path(__file__).with_name("card.css").read_text(encoding="utf-8")
    sight = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"<head>{sight}<title>{_text(title)}</title><style>{style}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}<body>{"".join(parts)}</body></html>\n'


def _headline(about: Mapping[str, Any]) -> Iterator[str]:
    name = about["headline"]
    score, ends = about["scores"].get(name, math.nan), about.get("interval")
    yield f'<div><span class="headline">{_number(score)}</span> <span class="faint">{_text(name)}'
    yield f"; 95 % interval over items {_number(ends[0])} to {_number(ends[1])}" if ends else ""
    yield "</span></div>"
    for warning in about.get("warnings", ()):
        yield f'<p class="warning">{_text(warning)}</p>'


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


def _figure(results: Results, row: Row, made: Made, verdict: Verdict) -> str:
    files = [*row.item.images, *([] if made.file is None else [results.images / made.file])]
    images = "".join(f'<img alt="" src="{_embedded(file)}">' for file in files)
    said = [_text(text) for text in (row.item.text, made.answer or "") if text]
    group = f'<span class="faint">{_text(verdict.kind)}, seed {row.seed}</span>' if verdict.kind else ""
    reason = "".join(f"<br><b>{_text(line)}</b>" for line in verdict.reason.splitlines())
    mark = "wrong" if verdict.score == 0 else "right" if verdict.score == 1 else ""
    score = "" if mark or math.isnan(verdict.score) else f"<br>{verdict.score:.3g}"
    caption = f"{'<br>'.join(said)}{reason}{score}<br>{group}"
    return f'<figure class="{mark}">{images}<figcaption>{caption}</figcaption></figure>'


def _embedded(file: Path) -> str:
    """An image file, shrunk, as an address that holds it; small ones are enlarged pixel by pixel."""
    image = open_image(file)
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        kind, options = "JPEG", {"quality": 85}
    else:
        times = max(1, SIDE // max(image.size))
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
        kind, options = "PNG", {}
    stored = io.BytesIO()
    image.save(stored, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stored.getvalue()).decode()}"


def _scores(scores: Mapping[str, float]) -> str:
    lines = "".join(f'<tr><td>{_text(name)}</td><td class="number">{_number(value)}</td></tr>' for name, value in scores.items())
    return f'<div class="scroll"><table>{lines}</table></div>'


def _table(values: Mapping[str, Any]) -> str:
    lines = "".join(f"<tr><td>{_text(key)}</td><td><code>{_text(_plain(value))}</code></td></tr>" for key, value in values.items())
    return f'<div class="scroll"><table>{lines}</table></div>'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else strict_json(value, ensure_ascii=False)


def _number(value: float) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.4g}"


def _text(value: str) -> str:
    return html.escape(printable(str(value)))
