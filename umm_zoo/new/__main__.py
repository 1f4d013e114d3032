"""``python -m umm_zoo.new DIR``: begin a project of one's own."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from umm_zoo.errors import UserError, say, user_errors

PROJECT = Path(__file__).resolve().parent / "project"


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.new",
        description="Begin a project: a block, a method, an experiment, a test and a job script in a folder of yours.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder to make, or an empty one")
    folder = Path(parser.parse_args(argv).folder)
    with user_errors() as outcome:
        begin(folder)
        say(f"written: {', '.join(sorted(file.name for file in folder.iterdir()))} in {folder}; next: {folder}/README.md")
    return outcome.code


def begin(folder: Path) -> None:
    """Copy the project.

    Raises:
        UserError: there is something already, or the folder cannot be made.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(folder, "a folder with files in it", "a new one, or an empty one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(PROJECT.iterdir()):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise UserError(folder, f"{error.strerror or error}", "a folder that can be written to") from error


if __name__ == "__main__":
    sys.exit(main())
