"""``python -m data_pipelines.inspect SHARDS``: counts, sizes, aspect ratios, text lengths, and a contact sheet."""

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

from data_pipelines.converters.converting import Parser, run
from data_pipelines.decoding import BadSampleError, open_image, to_rgb
from data_pipelines.shards.addresses import expand
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.index import load_index
from data_pipelines.tasks import Captions, Conversations, Sample, Task, TextToImage
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


def inspect(shards: list[str], every: int = 1, sheet: int = 24, drawn: bool = False) -> Findings:
    """Read every ``every``-th sample: its text, and of its images the header (those of the sheet are decoded).

    Args:
        shards: tar files.
        every: 1 reads all.
        sheet: samples kept for the contact sheet, spread evenly.
        drawn: where images stand beside plain captions, take them as images to be drawn.

    Raises:
        ValueError: a shard cannot be read at all.
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
            sample = _task(members, drawn)(key, members)
            _count(findings, sample)
        except BadSampleError as error:
            findings.bad[f"{index.path}:{key}"] = str(error)
            continue
        if place in kept:
            findings.shown.append((key, sample))
    return findings


def _task(members: dict[str, bytes], drawn: bool) -> Task:
    if "txt" in members and b'"conversations"' not in members.get("json", b""):
        return TextToImage() if drawn else Captions()
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
    """Input images and the image to be drawn of each sample, side by side, with question and answer below."""
    cells = []
    for _, sample in samples:
        contents = [*sample.images, *([] if sample.target is None else [sample.target])] or [b""]
        cell = Image.new("RGB", (edge * len(contents) + 4, edge + _TEXT_HEIGHT), "white")
        for place, content in enumerate(contents):
            cell.paste(_thumbnail(content, edge), (place * edge, 0))
        prompt, answer = split_answer(sample.conversation)
        question = prompt[-1]["text"].replace("<image>", "").strip() if prompt else ""
        pen, width = ImageDraw.Draw(cell), int(cell.width / _TEXT_COLUMNS)
        asked, told = (textwrap.wrap(_plain(text), width)[:2] for text in (question, answer))
        for line, (text, colour) in enumerate([*((text, "black") for text in asked), *((text, "darkgreen") for text in told)]):
            pen.text((2, edge + 2 + 15 * line), text, fill=colour)
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


def _plain(text: str) -> str:
    """What PIL's built-in font can draw."""
    return text.replace("\n", " ").encode("latin-1", "replace").decode("latin-1")


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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="python -m data_pipelines.inspect",
        description="Count what is in tar shards and draw a contact sheet.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, folders, globs, {000..015} ranges or addresses")
    made.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"), metavar="FILE", help="where the sheet is saved")
    made.add_argument("--every", type=int, default=1, metavar="N", help="read every N-th sample only")
    made.add_argument("--samples", type=int, default=24, metavar="N", help="samples on the sheet")
    made.add_argument("--drawn", action="store_true", help="images beside plain captions are to be drawn, not described")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Inspect, print, save the sheet.

    Raises:
        ValueError: an argument outside its range, or a shard that cannot be read.
        FileNotFoundError: there is no shard.
    """
    for option, value in (("--every", arguments.every), ("--samples", arguments.samples)):
        if value < 1:
            raise ValueError(f"{option}: found {value}, expected positive whole numbers")
    shards = expand(arguments.shards)
    findings = inspect(shards, arguments.every, arguments.samples, arguments.drawn)
    console = Console()
    print_findings(findings, len(shards), console)
    if findings.shown:
        file = io.BytesIO()
        contact_sheet(findings.shown).save(file, "PNG")
        arguments.sheet.write_bytes(file.getvalue())
        console.print(f"contact sheet: {arguments.sheet}", highlight=False)


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(parser().parse_args())))
