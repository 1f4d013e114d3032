"""Benchmarks of this package, its peers and its limits, with arms in turns.

    python tools/benchmark.py                                           every benchmark at its usual sizes
    python tools/benchmark.py bridge ross lengths=64,256 ross.batch=8   two of them, with sizes of their own
    python tools/benchmark.py bridge --against HEAD~5                   and the same arms of another commit or checkout
    python tools/benchmark.py bridge ross --metaquery CLONE --ross CLONE   and the official code
    python tools/benchmark.py NAME --sizes                              what can be set, with its default

Every turn of every arm is a process of its own with one thread; it is timed in processor time, on a GPU by the clock. Peers that
are not installed are left out, with the reason: TRL (pip install umm_zoo[trl]), LitData, timm (for ROSS's code); they may lie in
a folder of their own on PYTHONPATH. Read ratios, not times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

import yaml

from tools.benchmarks import report
from tools.benchmarks.limits import limits
from tools.benchmarks.turn import benchmark
from tools.benchmarks.turns import Arm, arms_of, checkout, in_turns, record
from umm_zoo.errors import UserError, user_errors

NAMES = ("bridge", "ross", "rollout", "loader", "lengths", "windows", "image_tokens", "saves", "fit", "families")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 when an arm of this checkout failed, 2 for a user error."""
    given = parser().parse_intermixed_args(arguments)
    with user_errors() as outcome, ExitStack() as open_trees:
        names, sizes = chosen(given.words)
        if given.sizes:
            print("\n\n".join(f"{name}: {benchmark(name).__doc__}\n{benchmark(name).SIZES}" for name in names))
            return 0
        trees = dict(open_trees.enter_context(checkout(place)) for place in given.against)
        from umm_zoo.training.report import circumstances

        where = {**circumstances(), "load": os.getloadavg()[0], "command": " ".join(["python tools/benchmark.py", *sys.argv[1:]])}
        machine, arms = {} if given.smallest else limits(given.device), list[Arm]()
        given.folder = open_trees.enter_context(tempfile.TemporaryDirectory())  # data that several arms read
        for name in names:
            options = options_of(name, sizes, given)
            own = [arm for arm in arms_of(name, options, trees) if not given.arms or arm.arm in given.arms]
            arms.extend(own)
            in_turns(own, options, trees, partial(save, given, arms, machine, where))
        print(save(given, arms, machine, where))
        outcome.code = int(any(arm.left_out and not arm.tree and arm.arm in benchmark(arm.benchmark).OWN for arm in arms))
    return outcome.code


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("words", nargs="*", metavar="NAME | [NAME.]SIZE=VALUE", help=f"of {', '.join(NAMES)}")
    made.add_argument("--repeats", type=int, default=3, help="turns of every arm (default 3)")
    made.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="these alone (default all)")
    made.add_argument("--against", action="append", default=[], metavar="COMMIT_OR_PATH", help="another state of this package")
    made.add_argument("--ross", default="", metavar="CLONE", help="of github.com/Haochen-Wang409/ross")
    made.add_argument("--metaquery", default="", metavar="CLONE", help="of github.com/facebookresearch/metaquery")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--out", type=Path, help="JSON file of all turns; the page goes beside it, as Markdown")
    made.add_argument("--smallest", action="store_true", help="the smallest sizes, to see whether all runs")
    made.add_argument("--sizes", action="store_true", help="say what can be set, and stop")
    return made


def chosen(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Names of benchmarks, and sizes by name or by ``benchmark.name``.

    Raises:
        UserError: no benchmark of that name, or no benchmark with such a size.
    """
    names = [word for word in words if "=" not in word] or list(NAMES)
    for name in names:
        if name not in NAMES:
            raise UserError("tools/benchmark.py", f"'{name}'", f"one of {', '.join(NAMES)}, or SIZE=VALUE")
    sizes = dict[str, Any]()
    for key, _, text in (word.partition("=") for word in words if "=" in word):
        owners = [key.partition(".")[0]] if "." in key else names
        known = {size: type(default) for name in owners if name in names for size, default in benchmark(name).SIZES.items()}
        kind = known.get(key.rpartition(".")[2])
        if kind is None:
            raise UserError("tools/benchmark.py", f"'{key}'", f"a size of {', '.join(names)}: {', '.join(sorted(known)) or 'none'}")
        sizes[key] = yaml.safe_load(f"[{text}]") if kind is list else kind(yaml.safe_load(text)) if kind is not str else text
    return names, sizes


def options_of(name: str, sizes: dict[str, Any], given: Namespace) -> Namespace:
    """The sizes of one benchmark, and what all have."""
    module = benchmark(name)
    own = {**module.SIZES, **(module.SMALLEST if given.smallest else {})}
    for key, value in sizes.items():
        owner, _, size = key.rpartition(".")
        if size in own and owner in ("", name):
            own[size] = value
    return Namespace(**own, **{key: getattr(given, key, None) for key in ("repeats", "device", "ross", "metaquery", "folder")})


def save(given: Namespace, arms: list[Arm], machine: dict[str, float], where: dict[str, Any]) -> str:
    """The page; written with the numbers where a file was named."""
    page = report.page("Benchmarks", arms, machine, where)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record(arms, where=where, limits=machine), indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(page, encoding="utf-8")
    return page


if __name__ == "__main__":
    sys.exit(main())
