"""What every converter shares: shards written piece by piece so that a stopped conversion goes on, progress, and a report."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from data_pipelines.decoding import BadSampleError

REPORT_FILE = "conversion.json"
_LISTED = 5

Item = TypeVar("Item")


class Parser(argparse.ArgumentParser):
    """Refuses a wrong command line in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the line and leave."""
        sys.stderr.write(f"error: {message} (--help lists every option)\n")
        raise SystemExit(2)


@dataclass
class Part(Generic[Item]):
    """One family of shards, ``OUT/NAME-000000.tar`` and so on.

    Args:
        name: folder and first part of the file names, such as ``train/questions``.
        items: what is converted, in the order in which it is written.
        make: the samples of one item (``__key__`` and members); ``BadSampleError`` leaves the item out, with its reason.
        label: how an item is named in the report.
        items_per_shard: items of one tar.
    """

    name: str
    items: Sequence[Item]
    make: Callable[[Item], Iterable[dict[str, Any]]]
    label: Callable[[Item], str] = str
    items_per_shard: int = 1000


@dataclass
class Outcome:
    """What a conversion wrote and left out, those parts included that a stopped run had already written."""

    samples: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)


def convert(out: Path, arguments: dict[str, Any], parts: Sequence[Part[Any]], overwrite: bool = False) -> Outcome:
    """Write every part; shards that a stopped run finished are kept.

    ``OUT/conversion.json`` remembers the arguments, a digest of the items, and each finished shard with what was left out of it.

    Raises:
        ValueError: the folder holds the outcome of another conversion, or nothing could be converted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from data_pipelines.write_shards import IndexedShardWriter, index_path

    digest = hashlib.sha256("\n".join(f"{part.name} {part.label(item)}" for part in parts for item in part.items).encode())
    head = {"arguments": arguments, "items": digest.hexdigest()}
    done = _finished(out, head, overwrite)
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
                if entry is None or (entry["samples"] and not (shard.is_file() and index_path(shard).is_file())):
                    left_out: dict[str, str] = {}
                    with IndexedShardWriter(out / folder, name, sys.maxsize, number) as writer:
                        for item in items:
                            try:
                                for sample in part.make(item):
                                    writer.write(sample)
                            except BadSampleError as error:
                                left_out[part.label(item)] = str(error)
                            progress.advance(bar)
                    summary = writer.summary
                    entry = {"samples": summary.samples, "kinds": dict(sorted(summary.kinds.items())), "left_out": left_out}
                    done[place] = entry
                    _write_report(out, {**head, "shards": done})
                else:
                    progress.advance(bar, len(items))
                outcome.samples[part.name] += entry["samples"]
                outcome.shards[part.name] += bool(entry["samples"])
                outcome.kinds.update(entry["kinds"])
                outcome.left_out.update(entry["left_out"])
    if not sum(outcome.samples.values()):
        reason = next(iter(outcome.left_out.items()), ("", "no item"))
        raise ValueError(f"{out}: nothing could be converted; the first reason: {' '.join(reason)}")
    return outcome


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
    if outcome.left_out:
        console.print(f"left out: {len(outcome.left_out)} (all of them in {out / REPORT_FILE})", highlight=False)
        for name, reason in list(outcome.left_out.items())[:_LISTED]:
            console.print(f"  {name}: {reason}", highlight=False, markup=False)


def _finished(out: Path, head: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    path = out / REPORT_FILE
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise ValueError(f"{out}: this folder is not empty and holds no conversion; choose another one, or give --overwrite")
        return {}
    if overwrite:
        former = json.loads(path.read_text(encoding="utf-8"))
        for place in former["shards"]:  # its own files and no others
            for suffix in (".tar", ".tar.index.json"):
                (out / f"{place}{suffix}").unlink(missing_ok=True)
        path.unlink()
        return {}
    former = json.loads(path.read_text(encoding="utf-8"))
    for name, value in head.items():
        if former.get(name) != json.loads(json.dumps(value)):
            raise ValueError(f"{out}: holds a conversion of other {name}; choose another folder, or give --overwrite")
    shards: dict[str, Any] = former["shards"]
    return shards


def _write_report(out: Path, content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{REPORT_FILE}.partial"
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, out / REPORT_FILE)


def run(main: Callable[[], None]) -> int:
    """Run a command; a user's mistake is one line and exit code 2, Ctrl-C says that it can go on."""
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on with the first unfinished shard\n")
        return 130
    return 0


__all__ = ["Outcome", "Parser", "Part", "convert", "print_report", "run"]
