"""One turn of one arm, in a process of its own: the order as JSON on standard input, the numbers as JSON in a file.

The packages come from the checkout that the order names, this folder from the one that it lies in: so the arms of today measure the
code of another commit.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parents[2]


def benchmark(name: str) -> ModuleType:
    """A benchmark by name."""
    return importlib.import_module(f"tools.benchmarks.{name}")


def main() -> int:
    """Measure what the order says."""
    order = json.load(sys.stdin)
    sys.path[0] = str(order["tree"])  # in place of this folder, whose files are called like packages
    tools = sys.modules["tools"] = ModuleType("tools")
    tools.__path__ = [str(HERE / "tools")]
    numbers = benchmark(order["name"]).measure(Namespace(**order["options"]), order["setting"], order["arm"])
    Path(order["out"]).write_text(json.dumps(numbers), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
