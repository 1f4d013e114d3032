"""What every converter shares: shards written piece by piece so that a stopped conversion goes on, progress, and a report."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from data_pipelines.decoding import BadSampleError
from data_pipelines.shards.writing import IndexedShardWriter, index_path

STATE_FILE = "conversion.json"
REPORT_FILE = "report.json"
_LISTED = 5
#: Longer texts are refused by the loader's default ``max_characters``; they are kept, and counted in the report.
_LONG_TEXT = 65_536

Item = TypeVar("Item")


class Parser(argparse.ArgumentParser):
    """Refuses a wrong command line in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the line and leave."""
        sys.stderr.write(f"error: {message} (--help lists every option)\n")
        raise SystemExit(2)


@dataclass(frozen=True)
class LeftOut:
    """Yielded by a ``make`` whose item is a whole file: one sample of it that is left out, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Noted:
    """Yielded by a ``make``: something that the report counts, such as a repair."""

    what: str
    count: int = 1


@dataclass
class Part(Generic[Item]):
    """One family of shards, ``OUT/NAME-000000.tar`` and so on.

    Args:
        name: folder and first part of the file names, such as ``train/questions``.
        items: what is converted, in the order in which it is written.
        make: the samples of one item (``__key__`` and members), among them any `LeftOut` and `Noted`; ``BadSampleError`` leaves
            (the rest of) the item out, with its reason. A reason reads "category: details" or "category (details)".
        label: how an item is named in the report.
        items_per_shard: items of one tar.
    """

    name: str
    items: Sequence[Item]
    make: Callable[[Item], Iterable[dict[str, Any] | LeftOut | Noted]]
    label: Callable[[Item], str] = str
    items_per_shard: int = 1000


@dataclass
class Outcome:
    """What a conversion wrote and left out, those parts included that a stopped run had already written."""

    samples: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> Counter[str]:
        """How much was left out for each category of reasons."""
        return Counter(re.split(r": | \(", reason, maxsplit=1)[0] for reason in self.left_out.values())

    def to_json(self) -> dict[str, Any]:
        """The report as it is saved."""
        counted = {"samples": self.samples, "shards": self.shards, "kinds": self.kinds, "notes": self.notes}
        rest = {"left_out": len(self.left_out), "reasons": dict(self.reasons().most_common()), "left_out_items": self.left_out}
        return {**{name: dict(counter) for name, counter in counted.items()}, **rest}


def convert(
    out: Path, arguments: dict[str, Any], parts: Sequence[Part[Any]], overwrite: bool = False, retry: bool = False
) -> Outcome:
    """Write every part; shards that a stopped run finished are kept.

    ``OUT/conversion.json`` remembers the arguments, a digest of the items, and each finished shard with what was left out of it;
    ``OUT/report.json`` is the outcome in numbers.

    Args:
        out: folder, made if need be.
        arguments: whatever decides about the bytes written; a conversion with others is not gone on with.
        parts: what to write.
        overwrite: remove the outcome of an earlier conversion first.
        retry: write the shards again from which something was left out (missing images may have arrived since).

    Raises:
        ValueError: the folder holds the outcome of another conversion, or nothing could be converted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    digest = hashlib.sha256("\n".join(f"{part.name} {part.label(item)}" for part in parts for item in part.items).encode())
    head = {"arguments": arguments, "items": digest.hexdigest()}
    done = _finished(out, head, overwrite)
    _write_json(out / STATE_FILE, {**head, "shards": done})  # at once: what a run killed in its first shard leaves is known as ours
    outcome = Outcome()
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=sum(len(part.items) for part in parts))
        for part in parts:
            progress.update(bar, description=part.name)
            folder, _, name = part.name.rpartition("/")
            for number, first in enumerate(range(0, len(part.items), part.items_per_shard)):
                items = part.items[first : first + part.items_per_shard]
                shard = out / folder / f"{name}-{number:06d}.tar"
                place = f"{part.name}-{number:06d}"
                entry = done.get(place)
                whole = entry is not None and (not entry["samples"] or (shard.is_file() and index_path(shard).is_file()))
                if entry is None or not whole or (retry and entry["left_out"]):
                    shard.unlink(missing_ok=True)
                    with IndexedShardWriter(out / folder, name, sys.maxsize, number) as writer:
                        left_out, notes = _write_items(writer, part, items, lambda: progress.advance(bar))
                    summary = writer.summary
                    entry = {"samples": summary.samples, "kinds": dict(sorted(summary.kinds.items())), "left_out": left_out}
                    done[place] = {**entry, "notes": dict(notes)}
                    _write_json(out / STATE_FILE, {**head, "shards": done})
                else:
                    progress.advance(bar, len(items))
                outcome.samples[part.name] += entry["samples"]
                outcome.shards[part.name] += bool(entry["samples"])
                outcome.kinds.update(entry["kinds"])
                outcome.notes.update(done[place].get("notes", {}))
                outcome.left_out.update(entry["left_out"])
    _write_json(out / REPORT_FILE, outcome.to_json())
    if not sum(outcome.samples.values()):
        (out / STATE_FILE).unlink(missing_ok=True)  # nothing to go on with: the next run begins anew
        reason = ": ".join(next(iter(outcome.left_out.items()), ("no item",)))
        raise ValueError(f"{out}: nothing could be converted; the first reason: {reason}")
    return outcome


def _write_items(
    writer: IndexedShardWriter, part: Part[Item], items: Sequence[Item], advance: Callable[[], None]
) -> tuple[dict[str, str], Counter[str]]:
    left_out: dict[str, str] = {}
    notes: Counter[str] = Counter()
    for item in items:
        try:
            for made in part.make(item):
                if isinstance(made, LeftOut):
                    left_out[made.label] = made.reason
                elif isinstance(made, Noted):
                    notes[made.what] += made.count
                else:
                    writer.write(made)
                    notes["text of over 65,536 characters (needs a higher max_characters)"] += _is_long(made)
        except BadSampleError as error:
            left_out[part.label(item)] = str(error)
        advance()
    return left_out, +notes


def _is_long(sample: dict[str, Any]) -> bool:
    turns = sample.get("json", {}).get("conversations", ())
    return sum(len(turn["text"]) for turn in turns) > _LONG_TEXT


def print_report(out: Path, outcome: Outcome) -> None:
    """Samples and shards per part, samples per kind, and what was left out."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=str(out))
    for column in ("part", "shards", "samples"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, samples in outcome.samples.items():
        table.add_row(name, str(outcome.shards[name]), f"{samples:,}")
    console.print(table)
    console.print("kinds: " + ", ".join(f"{kind or 'none'} {count:,}" for kind, count in sorted(outcome.kinds.items())))
    for what, count in sorted(outcome.notes.items()):
        console.print(f"{count:,} x {what}", highlight=False, markup=False)
    if outcome.left_out:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in outcome.reasons().most_common())
        console.print(f"reasons: {reasons}", highlight=False, markup=False)
        console.print(f"left out: {len(outcome.left_out)} (all of them in {out / REPORT_FILE})", highlight=False)
        for name, reason in list(outcome.left_out.items())[:_LISTED]:
            console.print(f"  {name}: {reason}", highlight=False, markup=False)


def _finished(out: Path, head: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    path = out / STATE_FILE
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: this is a file, a folder to write into is needed")
    if not path.is_file():
        if out.is_dir() and any(file.name != REPORT_FILE for file in out.iterdir()) and not overwrite:
            raise ValueError(f"{out}: this folder is not empty and holds no conversion; choose another one, or give --overwrite")
        return {}
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
        shards: dict[str, Any] = former["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); choose another folder, or remove this one") from error
    if overwrite:
        for place in shards:  # its own files and no others
            for suffix in (".tar", ".tar.index.json"):
                (out / f"{place}{suffix}").unlink(missing_ok=True)
        path.unlink()
        (out / REPORT_FILE).unlink(missing_ok=True)
        return {}
    for name, value in head.items() if shards else ():
        if former.get(name) != json.loads(json.dumps(value)):
            raise ValueError(f"{out}: holds a conversion of other {name}; choose another folder, or give --overwrite")
    return shards


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def split_of(name: str, val_share: float, seed: int = 0) -> str:
    """``val`` or ``train`` by a hash of a name: adding files moves no other file to another split."""
    return "val" if zlib.crc32(f"{seed} {name}".encode()) / 2**32 < val_share else "train"


def add_options(parser: argparse.ArgumentParser, unit: str = "samples", per_shard: int | None = 1000) -> None:
    """The options of a converter that copies images."""
    parser.add_argument("--image-size", type=int, metavar="N", help="shrink the long edge to N pixels (never enlarges)")
    if per_shard is not None:
        parser.add_argument(f"--{unit}-per-shard", type=int, default=per_shard, metavar="N", help=f"{unit} of one tar")
    parser.add_argument("--retry", action="store_true", help="write the shards again from which something was left out")
    parser.add_argument("--overwrite", action="store_true", help="replace the outcome of an earlier conversion")


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse whole numbers below 1 and shares outside of 0 to 1, whichever of the usual options there are.

    Raises:
        ValueError: with the option and what it accepts.
    """
    for name, value in vars(arguments).items():
        option = f"--{name.replace('_', '-')}"
        if (name == "image_size" or name.endswith("_per_shard")) and value is not None and value < 1:
            raise ValueError(f"{option}: found {value}, expected positive whole numbers")
        if name.endswith("_share") and not 0 <= value < 1:
            raise ValueError(f"{option}: found {value}, expected 0 to below 1")


def run(main: Callable[[], None]) -> int:
    """Run a command; a user's mistake is one line and exit code 2, Ctrl-C says that it can go on."""
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on with the first unfinished shard\n")
        return 130
    return 0
