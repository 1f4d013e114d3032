"""Fill the README's result tables from the files that commands wrote: ``python tools/update_readme.py [--check]``.

A block between ``<!-- results: PATH -->`` and ``<!-- end results -->`` is replaced by the tables of that comparison (PATH.json, of
``umm_zoo.compare``) or by that text (PATH.md, of ``tools/probe_parts.py``), so that no number in the README can be older than the
file it came from. ``--check`` changes nothing and exits with 1 if a block is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from umm_zoo.comparison.results import Results

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"<!-- results: (?P<path>\S+) -->\n|<!-- end results -->")


def tables(root: Path, path: str) -> str:
    """The question, the tables and the provenance of a comparison, without its title and with the plot's path from the root.

    What a ``.md`` file says is taken as it is.
    """
    if path.endswith(".md"):
        return (root / path).read_text(encoding="utf-8").rstrip("\n") + "\n"
    text = Results.read(root / path).markdown().split("\n", 2)[2]
    return re.sub(r"\]\(([^)/]+\.png)\)", rf"]({Path(path).parent.as_posix()}/\1)", text)


def filled(readme: str, root: Path = ROOT) -> str:
    """A text with every block made anew.

    Args:
        readme: the text.
        root: folder that the paths of its blocks start from.

    Raises:
        FileNotFoundError: a block names a file that does not exist.
        ValueError: a block is opened twice, or closed without having been opened, or left open.
    """
    parts, end, opened = [], 0, ""
    for mark in MARK.finditer(readme):
        path = mark["path"]
        if bool(path) == bool(opened):
            raise ValueError(f"README: found '{mark[0].strip()}' " + (f"inside the block of {opened}" if opened else "outside any"))
        parts.append(readme[end : mark.end()] if path else f"\n{tables(root, opened)}\n{mark[0]}")
        end, opened = mark.end(), path or ""
    if opened:
        raise ValueError(f"README: found no '<!-- end results -->' behind the block of {opened}")
    return "".join(parts) + readme[end:]


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite or check README.md; 1 if a block is stale, 2 if one cannot be filled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is not current")
    arguments = parser.parse_args(argv)
    readme = root / "README.md"
    old = readme.read_text(encoding="utf-8")
    try:
        new = filled(old, root)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        print("README.md is current" if old == new else "README.md has tables that are not current: run tools/update_readme.py")
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
