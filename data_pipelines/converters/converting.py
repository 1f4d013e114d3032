"""Conversion to shards, piece by piece so that a stopped one goes on; its command line, progress and report."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from data_pipelines.command import Parser, whole
from data_pipelines.decoding import BadSampleError
from data_pipelines.shards.indexing import index_path, write_json
from data_pipelines.shards.writing import IndexedShardWriter
from umm_zoo.errors import UserError

STATE_FILE = "conversion.json"
REPORT_FILE = "report.json"
_LISTED = 5
#: Longer texts are refused by the loader's default ``max_characters``; they are kept, and counted in the report.
_LONG_TEXT = 65_536
#: Arguments that decide nothing about the bytes written.
_IGNORED = ("source", "out", "images", "in_place", "overwrite", "retry")

Item = TypeVar("Item")


@dataclass(frozen=True)
class LeftOut:
    """Sample that is left out and why, yielded by a ``make`` whose item is a whole file."""

    label: str
    reason: str


@dataclass(frozen=True)
class Noted:
    """Remark that the report counts, such as a repair, yielded by a ``make``."""

    what: str
    count: int = 1


Made = dict[str, Any] | LeftOut | Noted


@dataclass
class Part(Generic[Item]):
    """Family of shards, ``OUT/NAME-000000.tar`` and so on; a name is a folder and the first part of file names (``train/vqa``).

    ``make`` gives the samples of one item (``__key__`` and members), among them any `LeftOut` and `Noted`; ``BadSampleError``
    leaves (the rest of) the item out, with a reason that reads "category: details" or "category (details)".
    """

    name: str
    items: Sequence[Item]
    make: Callable[[Item], Iterable[Made]]
    label: Callable[[Item], str] = str
    items_per_shard: int = 1000


def converter_parser(
    doc: str | None, source: str, unit: str | None = None, per_shard: int = 1000, edge: str = "long", needs_out: bool = True
) -> Parser:
    """The command line of a converter: ``SRC OUT``, and the options that all of them have.

    ``unit`` is what a tar holds ``per_shard`` of by default (None has no such option), ``edge`` the one that is shrunk.
    """
    made = Parser(doc)
    made.epilog = "A stopped conversion goes on when it is started again. Images are copied byte for byte unless shrunk."
    made.add_argument("source", type=Path, metavar="SRC", help=source)
    made.add_argument("out", type=Path, nargs=None if needs_out else "?", metavar="OUT", help="folder to write into")
    made.add_argument("--image-size", type=whole(1), metavar="N", help=f"shrink the {edge} edge to N pixels (never enlarges)")
    if unit is not None:
        made.add_argument(f"--{unit}-per-shard", type=whole(1), default=per_shard, metavar="N", help=f"{unit} of one tar")
    made.add_argument("--retry", action="store_true", help="write the shards again from which something was left out")
    made.add_argument("--overwrite", action="store_true", help="replace the outcome of an earlier conversion")
    return made


def convert(arguments: argparse.Namespace, parts: Sequence[Part[Any]], **decides: Any) -> None:
    """Write every part and print the report; shards that a stopped run finished are kept.

    ``OUT/conversion.json`` remembers the arguments, a digest of the items, and each finished shard with what was left out of it;
    ``OUT/report.json`` is the outcome in numbers. A conversion of other arguments, or of others of what else ``decides`` about the
    bytes written, is not gone on with.
    """
    out = arguments.out
    digest = hashlib.sha256("\n".join(f"{part.name} {part.label(item)}" for part in parts for item in part.items).encode())
    kept = {name: value for name, value in vars(arguments).items() if name not in _IGNORED}
    head = {"arguments": {**kept, **decides}, "items": digest.hexdigest()}
    done = _finished(out, head, arguments.overwrite)
    write_json(out / STATE_FILE, {**head, "shards": done}, indent=1)  # at once: what a run killed in its first shard leaves is ours
    written: list[tuple[str, dict[str, Any]]] = []
    with progress_bar("", sum(len(part.items) for part in parts)) as advance:
        for part in parts:
            for number, first in enumerate(range(0, len(part.items), part.items_per_shard)):
                items, place = part.items[first : first + part.items_per_shard], f"{part.name}-{number:06d}"
                if _is_whole(out, place, done.get(place), arguments.retry):
                    advance(len(items), part.name)
                else:
                    done[place] = _write_shard(out, part, number, items, partial(advance, 1, part.name))
                    write_json(out / STATE_FILE, {**head, "shards": done}, indent=1)
                written.append((part.name, done[place]))
    report = _report(written)
    write_json(out / REPORT_FILE, report, indent=1)
    if not any(entry["samples"] for _, entry in written):
        (out / STATE_FILE).unlink(missing_ok=True)  # nothing to go on with: the next run starts over
        reason = ": ".join(next(iter(report["left_out_items"].items()), ("no item",)))
        raise UserError(out, f"nothing could be converted; the first reason: {reason}")
    _print_report(out, report)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr; what it gives is called with a number of steps, and with another description where that changes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(description, total=total)
        yield lambda steps, text=None: progress.update(bar, advance=steps, description=text)


def _is_whole(out: Path, place: str, entry: dict[str, Any] | None, retry: bool) -> bool:
    """Whether a shard needs no writing."""
    if entry is None or (retry and entry["left_out"]):
        return False
    shard = out / f"{place}.tar"
    return not entry["samples"] or (shard.is_file() and index_path(shard).is_file())


def _write_shard(out: Path, part: Part[Item], number: int, items: Sequence[Item], advance: Callable[[], None]) -> dict[str, Any]:
    """Write one tar; what ``conversion.json`` says of it."""
    folder, _, name = part.name.rpartition("/")
    (out / f"{part.name}-{number:06d}.tar").unlink(missing_ok=True)
    left_out: dict[str, str] = {}
    notes: Counter[str] = Counter()
    with IndexedShardWriter(out / folder, name, sys.maxsize, number) as writer:
        for item in items:
            try:
                for made in part.make(item):
                    if isinstance(made, LeftOut):
                        left_out[made.label] = made.reason
                    elif isinstance(made, Noted):
                        notes[made.what] += made.count
                    else:
                        writer.write(made)
                        turns = made.get("json", {}).get("conversations", ())
                        is_long = sum(len(turn["text"]) for turn in turns) > _LONG_TEXT
                        notes["text of over 65,536 characters (needs a higher max_characters)"] += is_long
            except BadSampleError as error:
                left_out[part.label(item)] = str(error)
            advance()
    kinds = dict(sorted(writer.summary.kinds.items()))
    return {"samples": writer.summary.samples, "kinds": kinds, "left_out": left_out, "notes": dict(+notes)}


def _report(written: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Counts of what was written and left out, by the part and the entry of each shard, those of a stopped run included."""
    samples, shards, kinds, notes = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    left_out: dict[str, str] = {}
    for part, entry in written:
        samples[part] += entry["samples"]
        shards[part] += bool(entry["samples"])
        kinds.update(entry["kinds"])
        notes.update(entry.get("notes", {}))
        left_out |= entry["left_out"]
    reasons = Counter(re.split(r": | \(", reason, maxsplit=1)[0] for reason in left_out.values())
    counted = {"samples": samples, "shards": shards, "kinds": kinds, "notes": notes, "left_out": len(left_out)}
    return {**counted, "reasons": dict(reasons.most_common()), "left_out_items": left_out}


def _print_report(out: Path, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False, markup=False)
    table = Table("part", *(Column(name, justify="right") for name in ("shards", "samples")), title=str(out))
    for name, samples in report["samples"].items():
        table.add_row(name, str(report["shards"][name]), f"{samples:,}")
    console.print(table)
    console.print("kinds: " + ", ".join(f"{kind or 'none'} {count:,}" for kind, count in sorted(report["kinds"].items())))
    for what, count in sorted(report["notes"].items()):
        console.print(f"{count:,} x {what}")
    if report["left_out"]:
        console.print("reasons: " + ", ".join(f"{reason} {count:,}" for reason, count in report["reasons"].items()))
        console.print(f"left out: {report['left_out']} (all of them in {out / REPORT_FILE})")
        for name, reason in list(report["left_out_items"].items())[:_LISTED]:
            console.print(f"  {name}: {reason}")


def _finished(out: Path, head: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The shards that an earlier run of the same conversion finished."""
    path = out / STATE_FILE
    if out.exists() and not out.is_dir():
        raise UserError(out, "a file", "a folder to write into")
    if not path.is_file():
        if out.is_dir() and any(file.name != REPORT_FILE for file in out.iterdir()) and not overwrite:
            raise UserError(out, "this folder is not empty and holds no conversion; choose another one, or give --overwrite")
        return {}
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
        shards: dict[str, Any] = former["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(path, f"cannot be read ({error}); choose another folder, or remove this one") from error
    if overwrite:
        for place in shards:  # its own files and no others
            for suffix in (".tar", ".tar.index.json"):
                (out / f"{place}{suffix}").unlink(missing_ok=True)
        path.unlink()
        (out / REPORT_FILE).unlink(missing_ok=True)
        return {}
    for name, value in head.items() if shards else ():
        if former.get(name) != json.loads(json.dumps(value)):
            raise UserError(out, f"holds a conversion of other {name}; choose another folder, or give --overwrite")
    return shards


def image_folder_of(arguments: argparse.Namespace) -> Path:
    """The folder of the images that rows name: that of ``--images``, or that of the rows."""
    source: Path = arguments.source
    folder: Path = arguments.images or (source if source.is_dir() else source.parent)
    if arguments.images and not folder.is_dir():
        raise UserError("--images", f"{folder}: no such folder")
    return folder


def split_of(name: str, val_share: float, seed: int = 0) -> str:
    """``val`` or ``train`` by a hash of a name: adding files moves no other file to another split."""
    return "val" if zlib.crc32(f"{seed} {name}".encode()) / 2**32 < val_share else "train"
