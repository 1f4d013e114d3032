"""``python -m umm_zoo.report RUN…``: page of a run, of several runs over each other, or of a comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from umm_zoo.checkpoints.plain_files import write_whole, writing
from umm_zoo.comparison.page import comparison_page
from umm_zoo.comparison.results import Results
from umm_zoo.errors import UserError, say, user_errors
from umm_zoo.report.run_files import RunFiles
from umm_zoo.report.run_page import run_page, runs_page
from umm_zoo.training.run_folder import runs_folder

HELP = """examples:
  python -m umm_zoo.report runs/llava/shapes                       its page, runs/llava/shapes/report.html, made again
  python -m umm_zoo.report runs/a runs/b --out both.html           curves over each other, differences, scores, costs
  python -m umm_zoo.report experiments/compare/results/uae.json    the page of a comparison

A page is one file: it needs no network, and can be sent to somebody else."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    arguments = _parser().parse_args(argv)
    with user_errors(arguments.traceback) as outcome:
        out = write(arguments.runs, arguments.out)
        say(f"{out} ({out.stat().st_size / 1e6:.2f} MB)")
    return outcome.code


def write(sources: Sequence[str], out: str | None = None) -> Path:
    """Write the page of some sources; returns its path.

    Raises:
        UserError: one is neither a run folder nor the record of a comparison, or there are several and no ``out``.
    """
    records = [source for source in sources if source.endswith(".json")]
    if records and len(sources) > 1:
        raise UserError(records[0], "a comparison beside other sources", "one comparison by itself, or run folders")
    if records:
        text, path = (
            comparison_page(_record(records[0]), runs_folder()),
            Path(out or Path(records[0]).with_suffix(".html")),
        )
    elif len(sources) == 1:
        text, path = run_page(run := RunFiles.read(sources[0])), Path(out or run.folder.page_file)
    elif out is None:
        raise UserError("--out", "nothing", "the file to write, for a page of several runs")
    else:
        text, path = runs_page([RunFiles.read(source) for source in sources]), Path(out)
    with writing(path, "a file that can be written (--out FILE)"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return path


def _record(path: str) -> Results:
    try:
        return Results.read(Path(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"no record of a comparison ({type(error).__name__})"
        raise UserError(path, found, "the JSON file that umm_zoo.compare writes beside its table") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.report",
        description="Write a page about runs, which opens from the disk.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or the JSON record of one comparison")
    parser.add_argument("--out", metavar="FILE", help="the page to write (default: beside its source)")
    parser.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
