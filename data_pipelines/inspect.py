"""``python -m data_pipelines.inspect SHARDS``: report of counts, sizes, aspect ratios and text lengths, with a contact sheet."""

from __future__ import annotations

import argparse
import io
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from data_pipelines.command import SHARDS, Parser, run, whole
from data_pipelines.decoding import BadSampleError, open_image, to_rgb
from data_pipelines.shards.addresses import expand
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.index import load_index
from data_pipelines.tasks import Captions, Conversations, Sample, SampleTask, TextToImage
from umm_zoo.batch import split_answer

_QUANTILES = (0, 5, 50, 95, 100)
_TEXT_HEIGHT = 64  # four lines
_TEXT_COLUMNS = 6  # pixels per character of PIL's built-in font, roughly


@dataclass
class Findings:
    """What an inspection counted."""

    samples: int = 0
    bytes: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    replies: list[int] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    shown: list[tuple[str, Sample]] = field(default_factory=list)


def inspect(shards: list[str], every: int = 1, sheet: int = 24, generated: bool = False) -> Findings:
    """Read every ``every``-th sample: its text, and of its images the header (those of the sheet are decoded).

    Args:
        shards: tar files.
        every: 1 reads all.
        sheet: samples kept for the contact sheet, spread evenly.
        generated: where images stand beside plain captions, take them as images to generate.

    Raises:
        UserError: a shard cannot be read at all.
    """
    findings, files = Findings(), RangeReader()
    indexes = [load_index(path) for path in shards]
    places = [(index, number) for index in indexes for number in range(len(index))][::every]
    kept = {round(place) for place in np.linspace(0, len(places) - 1, min(sheet, len(places)))}
    for place, (index, number) in enumerate(places):
        key, members = index.key(number), files.members(index, number)
        findings.samples += 1
        findings.bytes += sum(len(content) for content in members.values())
        findings.images[" + ".join(sorted(members))] += 1
        try:
            sample = _task(members, generated)(key, members)
            _count(findings, sample)
        except BadSampleError as error:
            findings.bad[f"{index.path}:{key}"] = str(error)
            continue
        if place in kept:
            findings.shown.append((key, sample))
    return findings


def _task(members: dict[str, bytes], generated: bool) -> SampleTask:
    if "txt" in members and b'"conversations"' not in members.get("json", b""):
        return TextToImage() if generated else Captions()
    return Conversations()


def _count(findings: Findings, sample: Sample) -> None:
    for content in [*sample.images, *([] if sample.target is None else [sample.target])]:
        with open_image(content) as image:
            findings.widths.append(image.width)
            findings.heights.append(image.height)
    prompt, answer = split_answer(sample.conversation)
    findings.prompts.append(sum(len(turn["text"]) for turn in prompt))
    findings.replies.append(len(answer))
    task, kind = sample.meta.get("task", ""), sample.meta.get("kind", "")
    findings.tasks[f"{task}/{kind}" if kind else str(task)] += 1
    findings.answers[answer] += 1


def contact_sheet(samples: list[tuple[str, Sample]], edge: int = 128, columns: int = 6) -> Image.Image:
    """Input images and the image to generate of each sample, side by side, with question and answer below."""
    cells = []
    for _, sample in samples:
        contents = [*sample.images, *([] if sample.target is None else [sample.target])] or [b""]
        cell = Image.new("RGB", (edge * len(contents) + 4, edge + _TEXT_HEIGHT), "white")
        for place, content in enumerate(contents):
            cell.paste(_thumbnail(content, edge), (place * edge, 0))
        prompt, answer = split_answer(sample.conversation)
        question = prompt[-1]["text"].replace("<image>", "").strip() if prompt else ""
        pen, width = ImageDraw.Draw(cell), int(cell.width / _TEXT_COLUMNS)
        wrapped = [(line, colour) for text, colour in ((question, "black"), (answer, "darkgreen")) for line in _lines(text, width)]
        for number, (line, colour) in enumerate(wrapped):
            pen.text((2, edge + 2 + 15 * number), line, fill=colour)
        cells.append(cell)
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    sheet = Image.new("RGB", (max(sum(c.width for c in row) for row in rows), len(rows) * (edge + _TEXT_HEIGHT)), "white")
    for number, row in enumerate(rows):
        left = 0
        for cell in row:
            sheet.paste(cell, (left, number * (edge + _TEXT_HEIGHT)))
            left += cell.width
    return sheet


def _thumbnail(content: bytes, edge: int) -> Image.Image:
    try:
        with open_image(content) as image:
            small = to_rgb(image)
            scale = edge / max(small.size)
            resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
            return small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))), resample)
    except BadSampleError:
        return Image.new("RGB", (edge, edge), "lightgrey")


def _lines(text: str, width: int) -> list[str]:
    """The first two lines, in letters that PIL's built-in font has."""
    return textwrap.wrap(text.replace("\n", " ").encode("latin-1", "replace").decode("latin-1"), width)[:2]


def print_findings(findings: Findings, shards: int, console: Console) -> None:
    """Tables of what was found."""
    console.print(f"{findings.samples:,} samples read from {shards} shards, {findings.bytes / 1e6:,.1f} MB", highlight=False)
    counters = {"task/kind": findings.tasks, "members": findings.images, "most frequent answers": findings.answers}
    for title, counter in counters.items():
        table = Table("", "samples", "share", title=title, title_justify="left")
        for name, count in counter.most_common(12):
            table.add_row(name[:80] or "(none)", f"{count:,}", f"{count / findings.samples:.1%}")
        console.print(table)
    table = Table("", *("least", "5%", "median", "95%", "most"), title="sizes", title_justify="left")
    edges = np.asarray([findings.widths, findings.heights], dtype=np.float64)
    measures = {"width, pixels": edges[0], "height, pixels": edges[1], "width / height": edges[0] / edges[1]}
    lengths = {"prompt, characters": findings.prompts, "answer, characters": findings.replies}
    for name, values in [*measures.items(), *lengths.items()]:
        if len(values):
            table.add_row(name, *(f"{value:.4g}" for value in np.percentile(values, _QUANTILES)))
    console.print(table)
    if findings.bad:
        console.print(f"bad samples: {len(findings.bad)}", highlight=False)
        for name, reason in list(findings.bad.items())[:10]:
            console.print(f"  {name}: {reason}", highlight=False, markup=False)


def parser() -> Parser:
    """The command line."""
    made = Parser(__doc__)
    made.add_argument("shards", nargs="+", metavar="SHARDS", help=SHARDS)
    made.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"), metavar="FILE", help="where the sheet is saved")
    made.add_argument("--every", type=whole(1), default=1, metavar="N", help="read every N-th sample only")
    made.add_argument("--samples", type=whole(1), default=24, metavar="N", help="samples on the sheet")
    made.add_argument("--drawn", action="store_true", help="images beside plain captions are to be generated, not described")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Inspect, print, save the sheet."""
    shards = expand(arguments.shards)
    findings = inspect(shards, arguments.every, arguments.samples, arguments.drawn)
    console = Console(highlight=False)
    print_findings(findings, len(shards), console)
    if findings.shown:
        file = io.BytesIO()
        contact_sheet(findings.shown).save(file, "PNG")
        arguments.sheet.write_bytes(file.getvalue())
        console.print(f"contact sheet: {arguments.sheet}")


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
