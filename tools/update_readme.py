"""Result tables of the README files, filled from the files that commands wrote: ``python tools/update_readme.py [--check]``.

A block between ``<!-- results: PATH -->`` and ``<!-- end results -->`` is replaced by the tables of that comparison (PATH.json, of
``umm_zoo.compare``) or by that text (PATH.md, of ``tools/probe_parts.py``), so that no number can be older than the file it came
from; the matrix of checkpoints comes from the lists that the tests run over (umm_zoo/backbones/families.py and vlm_uses.py). PATH
starts from the root, wherever the README lies. ``--check`` changes nothing and exits with 1 if a block is stale.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from umm_zoo.backbones import families, vlm_uses
from umm_zoo.comparison.results import Results

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"<!-- results: (?P<path>\S+) -->\n|<!-- end results -->")


def tables(root: Path, path: str, folder: Path) -> str:
    """The question, the tables and the provenance of a comparison, without its title and with the plot's path from ``folder``.

    What a ``.md`` file says is taken as it is.
    """
    if path == "umm_zoo/backbones/families.py":
        return f"{families.markdown()}\n{vlm_uses.table()}"
    if path.endswith(".md"):
        return (root / path).read_text(encoding="utf-8").rstrip("\n") + "\n"
    text = Results.read(root / path).markdown().split("\n", 2)[2]
    plots = Path(os.path.relpath((root / path).parent, folder)).as_posix()
    return re.sub(r"\]\(([^)/]+\.png)\)", rf"]({plots}/\1)", text)


def filled(readme: str, root: Path = ROOT, folder: Path | None = None) -> str:
    """A text with every block made again.

    Args:
        readme: the text.
        root: folder that the paths of its blocks start from.
        folder: folder that the text lies in (default: ``root``).

    Raises:
        FileNotFoundError: a block names a file that does not exist.
        ValueError: a block is opened twice, or closed without having been opened, or left open.
    """
    parts, end, opened = [], 0, ""
    for mark in MARK.finditer(readme):
        path = mark["path"]
        if bool(path) == bool(opened):
            raise ValueError(f"found '{mark[0].strip()}' " + (f"inside the block of {opened}" if opened else "outside any"))
        parts.append(readme[end : mark.end()] if path else f"\n{tables(root, opened, folder or root)}\n{mark[0]}")
        end, opened = mark.end(), path or ""
    if opened:
        raise ValueError(f"found no '<!-- end results -->' behind the block of {opened}")
    return "".join(parts) + readme[end:]


def readmes(root: Path = ROOT) -> list[Path]:
    """The README files that may have tables: the root's, that of the backbones and those of the experiments."""
    some = [root / "README.md", root / "umm_zoo" / "backbones" / "README.md"]
    return [path for path in some if path.is_file()] + sorted((root / "experiments").rglob("README.md"))


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite or check the README files; 1 if a block is stale, 2 if one cannot be filled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is not current")
    arguments = parser.parse_args(argv)
    old = {path: path.read_text(encoding="utf-8") for path in readmes(root)}
    new: dict[Path, str] = {}
    for path, text in old.items():
        try:
            new[path] = filled(text, root, path.parent)
        except (OSError, ValueError) as error:
            print(f"error: {path.relative_to(root)}: {error}", file=sys.stderr)
            return 2
    stale = [path for path in old if new[path] != old[path]]
    for path in stale:
        if arguments.check:
            print(f"{path.relative_to(root)} has tables that are not current: run tools/update_readme.py")
        else:
            path.write_text(new[path], encoding="utf-8")
    if arguments.check and not stale:
        print("all tables are current")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
