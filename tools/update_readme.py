"""Fill the README's result tables from the files that ``umm_zoo.compare`` wrote: ``python tools/update_readme.py [--check]``.

A block between ``<!-- results: PATH.json -->`` and ``<!-- end results -->`` is replaced by the tables of that comparison, so that
no number in the README can be older than the file it came from. ``--check`` changes nothing and exits with 1 if a block is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from umm_zoo.comparison.results import Results

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: (?P<path>\S+) -->\n).*?(<!-- end results -->)", re.DOTALL)


def tables(path: Path) -> str:
    """The question, the tables and the provenance of a comparison, without its title and with the plot's path from the root."""
    text = Results.read(path).markdown().split("\n", 2)[2]
    folder = path.parent.relative_to(ROOT).as_posix()
    return re.sub(r"\]\(([^)/]+\.png)\)", rf"]({folder}/\1)", text)


def filled(readme: str) -> str:
    """The README with every block made anew.

    Raises:
        FileNotFoundError: a block names a file that does not exist.
    """
    return BLOCK.sub(lambda match: match[1] + "\n" + tables(ROOT / match["path"]) + "\n" + match[3], readme)


def main() -> int:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is not current")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if arguments.check:
        print("README.md is current" if old == new else "README.md has tables that are not current: run tools/update_readme.py")
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
