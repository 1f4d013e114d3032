"""``python -m data_pipelines.shapes OUT``: writer of the synthetic shapes world as WebDataset shards.

Written are OUT/SPLIT/TASK-000000.tar, each with its index. Running it again into the same folder adds what is missing; the same
arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from data_pipelines import tasks
from data_pipelines.command import Parser, run, whole
from data_pipelines.inspect import contact_sheet
from data_pipelines.shards.progress import progress_bar
from data_pipelines.shards.writing import IndexedShardWriter
from umm_zoo.checkpoints.plain_files import write_json
from umm_zoo.errors import UserError, locating, printable
from umm_zoo.shapes.samples import CAPTION_ORDERS, MARK_SHARE, SPLITS, TASKS, Sample, make_sample, usual_mark_share
from umm_zoo.shapes.scenes import SIZES, World

WORLD_FILE = "world.json"
SHEET_FILE = "contact_sheet.png"
_SHEET_SAMPLES = 30


def _names(expected: tuple[str, ...]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        wrong = [name for name in names if name not in expected]
        if wrong or not names:
            found = repr(wrong[0]) if wrong else "nothing"
            raise argparse.ArgumentTypeError(f"found {found}, expected {', '.join(expected)}, joined by commas")
        return tuple(name for name in expected if name in names)

    return parse


def parser() -> Parser:
    """The command line."""
    default = World()
    made = Parser(__doc__)
    made.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    made.add_argument("--seed", type=whole(0), default=0, help="the only source of randomness")
    made.add_argument("--cells", type=int, default=default.cells, help="2 for a board of 2x2 cells, 3 for 3x3")
    for name, range_ in (("colours", "4 to 8"), ("shapes", "2 to 4")):
        dest, what = f"num_{name}", f"number of {name}, {range_}"
        made.add_argument(f"--{name}", dest=dest, metavar=name.upper(), type=int, default=getattr(default, dest), help=what)
    made.add_argument("--sizes", type=_names(SIZES), default=SIZES, help="small, large, or both")
    made.add_argument("--max-objects", type=int, default=default.max_objects, help="most objects of a scene, 1 to 4")
    made.add_argument("--image-size", type=int, default=default.image_size, help="pixels a side, 32 or 64")
    made.add_argument("--detail", default=default.detail, help="fine detail of the objects: mark, stripes, glyph or none")
    made.add_argument("--max-jitter", type=int, default=default.max_jitter, help="largest shift of an object, in 1/256 of the side")
    made.add_argument("--plain", dest="striped", action="store_false", help="no faint stripes on the backgrounds")
    made.add_argument("--train", type=whole(0), default=4000, metavar="N", help="samples of each task in train")
    made.add_argument("--val", type=whole(0), default=400, metavar="N", help="samples of each task in val")
    made.add_argument("--test", type=whole(0), default=400, metavar="N", help="samples of each task in test and hybrid")
    made.add_argument("--heldout", type=whole(0), metavar="N", help="samples of each task in heldout (as many as in test)")
    made.add_argument("--tasks", type=_names(TASKS), default=TASKS, help="tasks to write, joined by commas")
    made.add_argument("--train-pairs", action="store_true", help="write mark pairs for train too, not only to test with")
    share = f"share of questions and dialogues that ask for the fine detail ({MARK_SHARE} where there is one)"
    made.add_argument("--mark-share", type=float, help=share)
    made.add_argument("--caption-order", choices=CAPTION_ORDERS, default="canonical", help="order of the clauses")
    made.add_argument("--samples-per-shard", type=whole(1), default=1000, metavar="N", help="most samples in a tar")
    made.add_argument("--overwrite", action="store_true", help="write again what is there already, or another world over it")
    return made


def plan(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The plan, by ``SPLIT/TASK``: number of samples and what else its bytes depend on; nothing is a ``UserError``."""
    options = {"mark_share": ("questions", "dialogues"), "caption_order": ("captions", "text_to_image")}
    wanted: dict[str, dict[str, Any]] = {}
    for task, split in product(arguments.tasks, SPLITS):
        count = getattr(arguments, split, None)
        count = arguments.test if count is None else count
        if (task == "hybrid_edits") != (split == "hybrid") or count == 0:
            continue
        if task == "pairs" and (arguments.detail == "none" or (split == "train" and not arguments.train_pairs)):
            continue
        entry = {"samples": count + count % 2 if task == "pairs" else count, "samples_per_shard": arguments.samples_per_shard}
        chosen = {name: getattr(arguments, name) for name, tasks in options.items() if task in tasks}
        wanted[f"{split}/{task}"] = {**entry, **chosen}
    if not wanted:
        raise UserError("", "nothing to write: every split has 0 samples")
    return wanted


def _already_there(out: Path, head: dict[str, Any], wanted: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """Parts that a former run wrote and this one keeps, by ``SPLIT/TASK``; never mixes two worlds in one folder."""
    path = out / WORLD_FILE
    if not path.is_file():
        return {}
    former = json.loads(path.read_text(encoding="utf-8"))
    former["world"] = {**World().to_json(), **former["world"]}  # of a version that had fewer arguments
    parts: dict[str, Any] = former["parts"]
    differs = [name for name, value in head.items() if former.get(name) != value]
    if not overwrite:
        if differs:
            found, expected = (f"{differs[0]} {one.get(differs[0])}" for one in (former, head))
            raise UserError(path, found, expected, "choose another folder or give --overwrite")
        for name, entry in wanted.items():
            recorded = parts.get(name, entry)
            there = {key: recorded.get(key, value) for key, value in entry.items()}
            if there != entry:
                raise UserError(out / name, f"samples written with {there}", str(entry), "give --overwrite to write them again")
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
    """Write the shards, the contact sheet and ``world.json``."""
    from rich.console import Console

    out, console, started = arguments.out, Console(markup=False), time.perf_counter()
    world = World(**{name: getattr(arguments, name) for name in World.__dataclass_fields__})
    if arguments.mark_share is None:
        arguments.mark_share = usual_mark_share(world)
    if not 0 <= arguments.mark_share <= 1:
        raise UserError("--mark-share", str(arguments.mark_share), "0 to 1")
    wanted = plan(arguments)
    head = {"world": world.to_json(), "seed": arguments.seed, "heldout": [list(pair) for pair in sorted(world.heldout)]}
    parts = _already_there(out, head, wanted, arguments.overwrite)
    sample = partial(make_sample, world, arguments.seed, mark_share=arguments.mark_share, caption_order=arguments.caption_order)
    missing = {name: entry for name, entry in wanted.items() if name not in parts}
    number = sum(entry["samples"] for entry in missing.values())
    write_json(out / WORLD_FILE, {**head, "parts": parts}, indent=1)
    with progress_bar("", number) as advance:
        for name, entry in missing.items():
            split, task = name.split("/")
            _remove_old(out, name)  # what a stopped run left
            with IndexedShardWriter(out / split, task, arguments.samples_per_shard) as writer:
                for index in range(entry["samples"]):
                    writer.write(sample(split, task, index).members(world))
                    advance(1, name)
            parts[name] = {**entry, "shards": len(writer.summary.shards), "kinds": dict(sorted(writer.summary.kinds.items()))}
            write_json(out / WORLD_FILE, {**head, "parts": parts}, indent=1)
    seconds = time.perf_counter() - started
    split_of = {task: split for split, task in (name.split("/") for name in reversed(wanted))}
    turns = [(task, index) for index in range(_SHEET_SAMPLES) for task in split_of][:_SHEET_SAMPLES]
    shown = sorted((sample(split_of[task], task, index) for task, index in turns), key=lambda item: item.key)
    with locating(out / SHEET_FILE, refusals=(OSError,)):
        contact_sheet([_on_sheet(item, item.members(world)) for item in shown], columns=4).save(out / SHEET_FILE)
    console.print(_table(wanted, parts, missing))
    rate = f", {number / seconds:.0f} samples/s" if number else "; everything was there already"
    console.print(printable(f"{number} samples written to {out} in {seconds:.1f} s{rate}"), highlight=False, soft_wrap=True)
    if (most := max((entry["samples"] for entry in wanted.values()), default=0)) > world.most_scenes:
        more = "more objects or colours, stripes, marks or jitter make more"
        what = f"this world has at most {world.most_scenes} different images, for up to {most} samples of a part"
        sys.stderr.write(f"note: {printable(str(out))}: {what}: they may be learnt by heart; {more}\n")


def _on_sheet(sample: Sample, members: dict[str, Any]) -> tuple[str, tasks.Sample]:
    inputs, target = tasks.input_images(members), tasks.target_image(members)
    title = f"{sample.row['task']}: {sample.row['kind']}" + (", the target alone" if target and not inputs else "")
    return title, tasks.Sample(sample.row["conversations"], inputs, target)


def _table(wanted: dict[str, Any], parts: dict[str, Any], missing: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("part", "samples", "shards", "kinds", "")
    for name in wanted:
        kinds = ", ".join(f"{kind} {count}" for kind, count in parts[name]["kinds"].items())
        counts = (str(parts[name][key]) for key in ("samples", "shards"))
        table.add_row(name, *counts, kinds, "" if name in missing else "was there already")
    return table


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(write, parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
