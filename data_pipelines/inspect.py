"""``python -m data_pipelines.inspect SHARDS``: report of counts, sizes, aspect ratios and text lengths, with a contact sheet."""

from __future__ import annotations

import argparse
import io
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_pipelines.command import SHARDS, Parser, run, whole
from data_pipelines.decoding import BadSampleError, one_sample, open_image, to_rgb, upright_size
from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.expanding import expand
from data_pipelines.shards.index import load_index
from data_pipelines.shards.indexing import verify_index
from data_pipelines.tasks import Captions, Conversations, Sample, SampleTask, TextToImage
from umm_zoo.conversation import IMAGE_MARKER, split_answer
from umm_zoo.errors import UserError, locating, printable, several


@dataclass
class Findings:
    """Counts of an inspection, and the samples for its contact sheet."""

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
    unreadable: list[UserError] = field(default_factory=list)


def inspect(shards: list[str], every: int = 1, sheet: int = 24, generated: bool = False, verify: bool = False) -> Findings:
    """Read every ``every``-th sample: its text, and the headers of its images; ``sheet`` samples, spread evenly, are kept.

    Images beside plain captions are input images, or with ``generated`` images to generate. ``verify`` compares the content of
    each shard with its index first. Shards that cannot be read are left out.
    """
    several("shards", shards)
    findings, files = Findings(), RangeReader()
    indexes = []
    for path in shards:
        try:
            index = load_index(path)
            if verify:
                verify_index(path, index.place, index.sha256)
            indexes.append(index)
            findings.bad |= {f"{index.shown}:*": "; ".join(index.damage)} if index.damage else {}
        except UserError as error:
            findings.unreadable.append(error)
    places = [(index, number) for index in indexes for number in range(len(index))][::every]
    kept = {round(place) for place in np.linspace(0, len(places) - 1, min(sheet, len(places)))}
    left_out = set[str]()
    for place, (index, number) in enumerate(places):
        if index.path in left_out:
            continue
        try:
            findings.samples += 1
            key = index.key(number)
            members = files.members(index, number)
            findings.bytes += sum(len(content) for content in members.values())
            findings.images[" + ".join(sorted(members))] += 1
            with one_sample():
                sample = _task(members, generated)(key, members)
                _count(findings, sample)
        except BadSampleError as error:
            findings.bad[f"{index.shown}:{key}"] = str(error)
            continue
        except UserError as error:  # its index is none, or another tar's
            findings.samples -= 1
            left_out.add(index.path)
            findings.unreadable.append(error)
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
            width, height = upright_size(image)
            findings.widths.append(width)
            findings.heights.append(height)
    prompt, answer = split_answer(sample.conversation)
    findings.prompts.append(sum(len(turn["text"]) for turn in prompt))
    findings.replies.append(len(answer))
    task, kind = sample.meta.get("task", ""), sample.meta.get("kind", "")
    findings.tasks[f"{task}/{kind}" if kind else str(task)] += 1
    findings.answers[answer] += 1


def contact_sheet(samples: list[tuple[str, Sample]], edge: int = 128, columns: int = 6) -> Image.Image:
    """Input images and the image to generate of each sample, given with its title, with question and answer below."""
    from umm_zoo.callbacks.cards import Card, draw_cards  # torch comes with it, and --help does without

    cards = []
    for title, sample in samples:
        prompt, answer = split_answer(sample.conversation)
        texts = [("> " if turn["role"] == "assistant" else "") + turn["text"].replace(IMAGE_MARKER, "").strip() for turn in prompt]
        named = {f"input {place}": content for place, content in enumerate(sample.images, 1)}
        named |= {} if sample.target is None else {"target": sample.target}
        images = {}
        for name, content in named.items():
            images[name] = Image.new("RGB", (8, 8), "lightgrey")
            with suppress(BadSampleError), open_image(content) as image:
                images[name] = to_rgb(image).copy()
        cards.append(Card(title, " ".join(texts), None, answer, None, images))
    return draw_cards(cards, edge, columns)


def cropped(findings: Findings) -> dict[str, NDArray[np.float64]]:
    """Share of each image that policies which cut something away would lose, by their names."""
    from data_pipelines.transforms.resize import Square  # torch comes with it, and --help does without
    from data_pipelines.transforms.shaped import Bucket

    sizes = list(zip(findings.widths, findings.heights, strict=True))
    policies = {"Square": Square(), "Bucket (sides of 1/16)": Bucket()}
    return {name: np.asarray([policy.crop(*size, 1024).lost for size in sizes]) for name, policy in policies.items()}


def print_findings(findings: Findings, shards: int, console: Console) -> None:
    """Tables of what was found."""
    console.print(f"{findings.samples:,} samples read from {shards} shards, {findings.bytes / 1e6:,.1f} MB")
    counters = {"task/kind": findings.tasks, "members": findings.images, "most frequent answers": findings.answers}
    for title, counter in counters.items():
        table = Table("", "samples", "share", title=title, title_justify="left")
        for name, count in counter.most_common(12):
            table.add_row(printable(name[:80]) or "(none)", f"{count:,}", f"{count / findings.samples:.1%}")
        console.print(table)
    table = Table("", *("least", "5%", "median", "95%", "most"), title="sizes", title_justify="left")
    widths, heights = np.asarray([findings.widths, findings.heights], dtype=np.float64)
    measures = {"width, pixels": widths, "height, pixels": heights, "width / height": widths / heights}
    lost = {f"{name}, % lost": 100 * shares for name, shares in cropped(findings).items()}
    lengths = {"prompt, characters": findings.prompts, "answer, characters": findings.replies}
    for name, values in {**measures, **lost, **lengths}.items():
        if len(values):
            table.add_row(name, *(f"{value:.4g}" for value in np.percentile(values, (0, 5, 50, 95, 100))))
    console.print(table)
    if findings.bad:
        console.print(f"bad samples: {len(findings.bad)}")
        for name, reason in list(findings.bad.items())[:10]:
            console.print(printable(f"{name}: {reason}"))


def parser() -> Parser:
    """The command line."""
    made = Parser(__doc__)
    made.add_argument("shards", nargs="+", metavar="SHARDS", help=SHARDS)
    made.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"), metavar="FILE", help="where the sheet is saved")
    made.add_argument("--every", type=whole(1), default=1, metavar="N", help="read every N-th sample only")
    made.add_argument("--samples", type=whole(1), default=24, metavar="N", help="samples on the sheet")
    made.add_argument(
        "--verify", action="store_true", help="compare the content of each shard with its index (sha256, every member)"
    )
    made.add_argument("--drawn", action="store_true", help="images beside plain captions are to be generated, not described")
    return made


def main(arguments: argparse.Namespace) -> None:
    """Inspect, print, save the sheet."""
    shards = expand(arguments.shards)
    findings = inspect(shards, arguments.every, arguments.samples, arguments.drawn, arguments.verify)
    console = Console(highlight=False, markup=False)
    print_findings(findings, len(shards) - len(findings.unreadable), console)
    if findings.shown:
        file = io.BytesIO()
        contact_sheet(findings.shown).save(file, "PNG")
        with locating(arguments.sheet, refusals=(OSError,)):
            arguments.sheet.write_bytes(file.getvalue())
        console.print(printable(f"contact sheet: {arguments.sheet}"))
    if findings.unreadable:
        raise UserError("", [problem for error in findings.unreadable for problem in error.problems])
    if arguments.verify:
        console.print(f"{len(shards)} shards are what their indexes were made for")


if __name__ == "__main__":
    raise SystemExit(run(main, parser().parse_args()))
