"""``python -m data_pipelines.shapes OUT``: write the shapes world as WebDataset shards."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from umm_zoo.shapes.samples import CAPTION_ORDERS, SPLITS, TASKS, make_sample
from umm_zoo.shapes.scenes import SIZES, World

WORLD_FILE = "world.json"
SHEET_FILE = "contact_sheet.png"
_SHEET_SAMPLES = 30


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message} (--help lists every option)\n")
        raise SystemExit(2)


def _names(expected: tuple[str, ...]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        wrong = [name for name in names if name not in expected]
        if wrong or not names:
            found = repr(wrong[0]) if wrong else "nothing"
            raise argparse.ArgumentTypeError(f"found {found}, expected {', '.join(expected)}, joined by commas")
        return tuple(name for name in expected if name in names)

    return parse


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 0 or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default = World()
    made = _Parser(
        prog="python -m data_pipelines.shapes",
        description="Write the synthetic shapes world as WebDataset shards: OUT/SPLIT/TASK-000000.tar, each with its index.",
        epilog="Running it again into the same folder adds what is missing; the same arguments give the same bytes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    made.add_argument("--seed", type=_count, default=0, help="the only source of randomness")
    made.add_argument("--cells", type=int, default=default.cells, help="2 for a board of 2x2 cells, 3 for 3x3")
    made.add_argument("--colours", type=int, default=default.num_colours, help="number of colours, 4 to 8")
    made.add_argument("--shapes", type=int, default=default.num_shapes, help="number of shapes, 2 to 4")
    made.add_argument("--sizes", type=_names(SIZES), default=SIZES, help="small, large, or both")
    made.add_argument("--max-objects", type=int, default=default.max_objects, help="most objects of a scene, 1 to 4")
    made.add_argument("--image-size", type=int, default=default.image_size, help="pixels a side, 32 or 64")
    made.add_argument("--detail", default=default.detail, help="fine detail of the objects: mark, stripes or glyph")
    made.add_argument("--train", type=_count, default=4000, metavar="N", help="samples of each task in train")
    made.add_argument("--val", type=_count, default=400, metavar="N", help="samples of each task in val")
    made.add_argument("--test", type=_count, default=400, metavar="N", help="samples of each task in test and hybrid")
    made.add_argument("--heldout", type=_count, metavar="N", help="samples of each task in heldout (as many as in test)")
    made.add_argument("--tasks", type=_names(TASKS), default=TASKS, help="tasks to write, joined by commas")
    made.add_argument("--train-pairs", action="store_true", help="write mark pairs for train too, not only to test with")
    made.add_argument("--mark-share", type=float, default=0.2, help="share of questions and dialogues that ask for the fine detail")
    made.add_argument("--caption-order", choices=CAPTION_ORDERS, default="canonical", help="order of the clauses")
    made.add_argument("--samples-per-shard", type=_count, default=1000, metavar="N", help="most samples in a tar")
    made.add_argument("--overwrite", action="store_true", help="write again what is there already, or another world over it")
    return made


def plan(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What was asked for, by ``SPLIT/TASK``: the number of samples and whatever else its bytes depend on."""
    heldout = arguments.test if arguments.heldout is None else arguments.heldout
    counts = {"train": arguments.train, "val": arguments.val, "test": arguments.test, "heldout": heldout}
    wanted: dict[str, dict[str, Any]] = {}
    for task in arguments.tasks:
        splits = ["hybrid"] if task == "hybrid_edits" else [name for name in SPLITS if name != "hybrid"]
        for split in splits:
            count = counts.get(split, arguments.test)
            if count == 0 or (task == "pairs" and split == "train" and not arguments.train_pairs):
                continue
            entry: dict[str, Any] = {"samples": count + count % 2 if task == "pairs" else count}
            entry["samples_per_shard"] = arguments.samples_per_shard
            if task in ("questions", "dialogues"):
                entry["mark_share"] = arguments.mark_share
            if task in ("captions", "text_to_image"):
                entry["caption_order"] = arguments.caption_order
            wanted[f"{split}/{task}"] = entry
    if not wanted:
        raise ValueError("nothing to write: every split asked for has 0 samples")
    return wanted


def _already_there(out: Path, head: dict[str, Any], wanted: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The parts a former run wrote and this one keeps, by ``SPLIT/TASK``; never mixes two worlds in one folder."""
    path = out / WORLD_FILE
    if not path.is_file():
        return {}
    former = json.loads(path.read_text(encoding="utf-8"))
    parts: dict[str, Any] = former["parts"]
    differs = [name for name, value in head.items() if former.get(name) != value]
    if not overwrite:
        if differs:
            found = former.get(differs[0])
            raise ValueError(f"{path}: holds another {differs[0]} ({found}); choose another folder or give --overwrite")
        for name, entry in wanted.items():
            recorded = parts.get(name, entry)
            there = {key: recorded.get(key, value) for key, value in entry.items()}
            if there != entry:
                raise ValueError(f"{out / name}: was written with {there}, now asked for {entry}; give --overwrite")
            if unknown := entry.keys() - recorded.keys():  # by a version that did not record all that the bytes depend on
                sys.stderr.write(f"note: {out / name} is kept as it is; nothing tells its {', '.join(sorted(unknown))}\n")
        return parts
    for name in parts if differs else [name for name in wanted if name in parts]:
        _remove_old(out, name)
    return {} if differs else {name: part for name, part in parts.items() if name not in wanted}


def _remove_old(out: Path, name: str) -> None:
    """Remove the shards of one part and their indices."""
    split, task = name.split("/")
    for old in sorted((out / split).glob(f"{task}-[0-9]*.tar*")):
        old.unlink()


def write(arguments: argparse.Namespace) -> None:
    """Write the shards, the contact sheet and ``world.json``.

    Raises:
        ValueError: arguments outside the expected ranges, or a folder that holds something else.
    """
    world = World(
        cells=arguments.cells,
        num_colours=arguments.colours,
        num_shapes=arguments.shapes,
        max_objects=arguments.max_objects,
        image_size=arguments.image_size,
        detail=arguments.detail,
        sizes=arguments.sizes,
    )
    if not 0 <= arguments.mark_share <= 1:
        raise ValueError(f"--mark-share: found {arguments.mark_share}, expected 0 to 1")
    if arguments.samples_per_shard < 1:
        raise ValueError("--samples-per-shard: found 0, expected 1 or more")
    wanted = plan(arguments)
    head = {"world": world.to_json(), "seed": arguments.seed, "heldout": [list(pair) for pair in sorted(world.heldout)]}
    parts = _already_there(arguments.out, head, wanted, arguments.overwrite)
    _write_parts(arguments, world, head, parts, wanted)


def _write_parts(
    arguments: argparse.Namespace,
    world: World,
    head: dict[str, Any],
    parts: dict[str, Any],
    wanted: dict[str, dict[str, Any]],
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from data_pipelines.shards.writing import IndexedShardWriter

    console = Console()
    started = time.perf_counter()
    missing = {name: entry for name, entry in wanted.items() if name not in parts}
    path = arguments.out / WORLD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_world(path, {**head, "parts": parts})
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(entry["samples"] for entry in missing.values()))
        for name, entry in missing.items():
            progress.update(bar, description=name)
            split, task = name.split("/")
            _remove_old(arguments.out, name)  # what a stopped run left
            with IndexedShardWriter(arguments.out / split, task, arguments.samples_per_shard) as writer:
                for index in range(entry["samples"]):
                    sample = make_sample(world, arguments.seed, split, task, index, arguments.mark_share, arguments.caption_order)
                    writer.write(sample.members(world))
                    progress.advance(bar)
            summary = writer.summary
            parts[name] = {**entry, "shards": len(summary.shards), "kinds": dict(sorted(summary.kinds.items()))}
            _write_world(path, {**head, "parts": parts})
    _write_sheet(arguments, world, list(wanted))
    _print_table(console, wanted, parts, missing)
    written = sum(entry["samples"] for entry in missing.values())
    seconds = time.perf_counter() - started
    rate = f", {written / seconds:.0f} samples/s" if written else "; everything was there already"
    console.print(f"{written} samples written to {arguments.out} in {seconds:.1f} s{rate}", highlight=False, soft_wrap=True)


def _write_world(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _write_sheet(arguments: argparse.Namespace, world: World, names: list[str]) -> None:
    from umm_zoo.shapes.sheet import save_contact_sheet

    shown: Counter[str] = Counter()
    samples = []
    by_task = {name.split("/")[1]: name.split("/")[0] for name in reversed(names)}
    for i in range(_SHEET_SAMPLES):
        task = list(by_task)[i % len(by_task)]
        samples.append(
            make_sample(world, arguments.seed, by_task[task], task, shown[task], arguments.mark_share, arguments.caption_order)
        )
        shown[task] += 1
    samples.sort(key=lambda sample: sample.key)
    save_contact_sheet(arguments.out / SHEET_FILE, world, samples)


def _print_table(console: Any, wanted: dict[str, Any], parts: dict[str, Any], missing: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("part", "samples", "shards", "kinds", "")
    for name in wanted:
        part = parts[name]
        kinds = ", ".join(f"{kind} {count}" for kind, count in part["kinds"].items())
        table.add_row(name, str(part["samples"]), str(part["shards"]), kinds, "" if name in missing else "was there already")
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Run the command; a user's mistake is one line and exit code 2."""
    arguments = parser().parse_args(argv)
    try:
        write(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; the finished parts in {arguments.out} are whole, run again to add the rest\n")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
