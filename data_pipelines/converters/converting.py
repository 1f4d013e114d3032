"""Conversion to shards, piece by piece so that a stopped one goes on; its command line, progress and report.

Every row of the source ends as samples or as a counted, named reason, and the report's counts add up to the rows of the source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from data_pipelines.command import Parser, add_part, whole
from data_pipelines.converters.report import REPORT_FILE, count_rows, entry_of, print_report
from data_pipelines.converters.state import Shards, State
from data_pipelines.decoding import BadSampleError, check_utf8, one_sample
from data_pipelines.shards.indexing import index_path
from data_pipelines.shards.progress import progress_bar
from data_pipelines.shards.writing import IndexedShardWriter
from data_pipelines.tasks import Conversations
from umm_zoo.checkpoints.plain_files import write_json
from umm_zoo.errors import UserError, printable, say

#: Longer texts are refused by the loader's default ``max_characters``; they are kept, and counted in the report.
_LONG_TEXT = 65_536
_LONG = "text of over 65,536 characters (needs a higher max_characters)"
#: Reads every sample before it is written: what the loader would refuse is left out.
_LOADER = Conversations(max_characters=sys.maxsize)
#: Arguments that decide nothing about the bytes written.
_IGNORED = ("source", "out", "images", "in_place", "overwrite", "retry", "part")

#: Splits by their usual names.
SPLITS = {"train": "train", "training": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"dev": "val", "test": "test", "testing": "test"}

Item = TypeVar("Item")


@dataclass(frozen=True)
class LeftOut:
    """Row that is left out and why, yielded by a ``make`` whose item holds many."""

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

    An item is one row of the source, unless it ``holds_rows``, such as a file: then every sample and every `LeftOut` of it is one.
    ``make`` gives the samples of one item (``__key__`` and members), among them any `LeftOut` and `Noted`. Whatever it raises
    leaves (the rest of) the item out; the reason of a ``BadSampleError`` reads "category: details" or "category (details)".
    ``not_chosen`` counts the rows, by reason, for which there is no item.
    """

    name: str
    items: Sequence[Item]
    make: Callable[[Item], Iterable[Made]]
    label: Callable[[Item], str] = str
    items_per_shard: int = 1000
    holds_rows: bool = False
    not_chosen: Mapping[str, int] = field(default_factory=dict)


class Shard(NamedTuple):
    """Tar of a part, and the items that it is of."""

    part: Part[Any]
    number: int
    items: Sequence[Any]

    @property
    def place(self) -> str:
        """Its name in the folder, without the suffix."""
        return f"{self.part.name}-{self.number:06d}"


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
    add_part(made)
    made.add_argument("--retry", action="store_true", help="write the shards again from which something was left out")
    made.add_argument("--overwrite", action="store_true", help="replace the outcome of an earlier conversion")
    return made


def convert(
    arguments: argparse.Namespace,
    parts: Sequence[Part[Any]],
    refused: Mapping[str, str] | None = None,
    hints: Mapping[str, str] | None = None,
    **decides: Any,
) -> bool:
    """Write every part and print the report; shards that a stopped run finished are kept. Returns whether all shards are written.

    ``refused`` are rows of the source that belong to no part, and why; ``hints`` say what helps, by words of a reason.
    Shards are shared out by ``arguments.part``, see `State`; the part that finishes last writes ``OUT/report.json``, the outcome in
    numbers. A conversion of other arguments, or of others of what else ``decides`` about the bytes written, is not gone on with.
    """
    out, portion = arguments.out, arguments.part
    digest = hashlib.sha256(
        "\n".join(f"{part.name} {printable(part.label(item))}" for part in parts for item in part.items).encode()
    )
    kept = {name: value for name, value in vars(arguments).items() if name not in _IGNORED}
    state = State(out, {"arguments": {**kept, **decides}, "items": digest.hexdigest()}, portion, arguments.overwrite)
    plan = [shard for part in parts for shard in _shards_of(part)]
    mine, done = portion.of(plan), state.shards()
    missing = {shard.place for shard in mine if not _is_whole(out, shard.place, done.get(shard.place), arguments.retry)}
    for place in missing:  # now, so that no other part takes for finished what is to be written again
        (out / f"{place}.tar").unlink(missing_ok=True)
    with progress_bar("", sum(len(shard.items) for shard in mine)) as advance:
        for shard in mine:
            if shard.place not in missing:
                advance(len(shard.items), shard.part.name)
            else:
                state.record({shard.place: _write_shard(out, shard, partial(advance, 1, shard.part.name))})
    done = state.shards()
    waiting = [shard for shard in plan if not _is_whole(out, shard.place, done.get(shard.place))]
    if waiting and portion.count > 1:
        print_report(f"{out}, part {portion}", _report(mine, done), state.path)
        unfinished = f"{len(waiting):,} of {len(plan):,} shards are not written yet, such as {waiting[0].place}"
        say(f"{unfinished}; the part that finishes last writes {out / REPORT_FILE}")
        return False
    report = _report(plan, done, parts, refused)
    write_json(out / REPORT_FILE, report, indent=1)
    has_samples = any(done[shard.place]["samples"] for shard in plan)
    state.close(
        {shard.place: done[shard.place] for shard in plan} if has_samples else {}
    )  # with nothing to go on with, the next run starts over
    if not has_samples:
        reason = ": ".join(next(iter(report["left_out_items"].items()), (*report["reasons"], "no item")[:1]))
        hint = next((hint for words, hint in (hints or {}).items() if words in reason), "")
        raise UserError(out, f"nothing could be converted; the first reason: {reason}", hint=hint)
    print_report(str(out), report, out / REPORT_FILE)
    return True


def _shards_of(part: Part[Any]) -> Iterator[Shard]:
    for number, first in enumerate(range(0, len(part.items), part.items_per_shard)):
        yield Shard(part, number, part.items[first : first + part.items_per_shard])


def _report(
    shards: Sequence[Shard], done: Shards, parts: Sequence[Part[Any]] = (), refused: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The outcome of some shards in numbers: of all of them with the ``parts`` they are of, and what is ``refused`` before."""
    written = [(shard.part.name, done[shard.place]) for shard in shards]
    left_out = {printable(label): printable(reason) for label, reason in (refused or {}).items()}
    written += [("source", entry_of(left_out=left_out))] if left_out else []
    expected = dict.fromkeys((part.name for part in parts), 0)
    for shard in shards:
        expected[shard.part.name] = expected.get(shard.part.name, 0) + len(shard.items)
    rows = {shard.part.name for shard in shards if shard.part.holds_rows}
    return count_rows(
        written,
        {name: None if name in rows else count for name, count in expected.items()},
        {part.name: part.not_chosen for part in parts},
    )


def _is_whole(out: Path, place: str, entry: dict[str, Any] | None, retry: bool = False) -> bool:
    """Whether a shard needs no writing."""
    if entry is None or "converted" not in entry or (retry and entry["left_out"]):
        return False
    shard = out / f"{place}.tar"
    return not entry["samples"] or (shard.is_file() and index_path(shard).is_file())


def _write_shard(out: Path, shard: Shard, advance: Callable[[], None]) -> dict[str, Any]:
    """Write one tar; what ``conversion.json`` says of it."""
    part = shard.part
    folder, _, name = part.name.rpartition("/")
    left_out: dict[str, str] = {}
    labels, notes, converted = Counter[str](), Counter[str](), 0
    with IndexedShardWriter(out / folder, name, sys.maxsize, shard.number) as writer:
        for item in shard.items:
            before = writer.summary.samples
            for made in _made(part, item):
                if isinstance(made, LeftOut):
                    label = printable(made.label)
                    labels[label] += 1
                    left_out[label if labels[label] == 1 else f"{label} ({labels[label]})"] = printable(made.reason)
                elif isinstance(made, Noted):
                    notes[printable(made.what)] += made.count
                else:
                    writer.write(made)
            samples = writer.summary.samples - before
            converted += samples if part.holds_rows else min(samples, 1)
            advance()
    kinds = dict(sorted(writer.summary.kinds.items()))
    return entry_of(writer.summary.samples, converted, kinds, left_out, dict(+notes))


def _made(part: Part[Item], item: Item) -> Iterator[Made]:
    """What becomes of an item: samples, all of which can be written, or a reason; all errors of a row are caught here."""
    kept: list[Made] = []
    count = 0
    try:
        with one_sample("row cannot be converted"):
            for made in part.make(item):
                if isinstance(made, dict):
                    try:
                        length = _check(made)
                        kept += [Noted(_LONG)] * (length > _LONG_TEXT)
                    except (BadSampleError, ValueError) as error:
                        if not part.holds_rows:
                            raise
                        made = LeftOut(f"{part.label(item)}, {made['__key__']}", str(error))
                count += not isinstance(made, Noted)
                if part.holds_rows:
                    yield made
                else:
                    kept.append(made)  # all samples of a row are written, or none
    except BadSampleError as error:
        kept, count = [LeftOut(part.label(item), str(error))], count + 1
    yield from kept if count else [*kept, LeftOut(part.label(item), "nothing to convert in it")]


def _check(sample: Mapping[str, Any]) -> int:
    """The length of a sample's json; a ``BadSampleError`` where it cannot be written, or the loader would refuse it."""
    text = check_utf8(json.dumps(row := sample.get("json"), ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    if isinstance(row, dict) and "conversations" in row:
        _LOADER(sample["__key__"], {**sample, "json": text.encode()})
    return len(text)


def image_folder_of(arguments: argparse.Namespace) -> Path:
    """The folder of the images that rows name: that of ``--images``, or that of the rows."""
    source: Path = arguments.source
    folder: Path = arguments.images or (source if source.is_dir() else source.parent)
    if arguments.images and not folder.is_dir():
        raise UserError("--images", f"{folder}: no such folder")
    return folder


def split_of(name: str, val_share: float, seed: int = 0) -> str:
    """``val`` or ``train`` by a hash of a name: adding files moves no other file to another split."""
    return "val" if zlib.crc32(f"{seed} {name}".encode(errors="backslashreplace")) / 2**32 < val_share else "train"
