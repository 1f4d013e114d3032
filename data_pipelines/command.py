"""Command lines of this package: parsers that refuse in one line, and user errors as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from umm_zoo.errors import UserError, user_errors

SHARDS = "tar files, folders, globs, {000..015} ranges or addresses"


class Parser(argparse.ArgumentParser):
    """Parser of ``python -m data_pipelines.NAME``; a wrong command line is one line and exit code 2.

    Args:
        name: of the command.
        description: what it does.
        epilog: below the options.
    """

    def __init__(self, name: str, description: str, epilog: str | None = None) -> None:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog=f"python -m data_pipelines.{name}", description=description, epilog=epilog, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        """Print the line and leave."""
        sys.stderr.write(f"error: {message} (--help lists every option)\n")
        raise SystemExit(2)


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text}, expected a whole number from {least} on")
        return int(text)

    return parse


def share(text: str) -> float:
    """The type of an option that takes shares from 0 to below 1."""
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {text}, expected a number from 0 to below 1")


def run(main: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Run a command on its parsed command line; returns the exit code: 2 for a user error, 130 for Ctrl-C."""
    with user_errors(getattr(arguments, "traceback", False)) as outcome:
        try:
            main(arguments)
        except OSError as error:
            raise UserError(error.filename or "", error.strerror or str(error)) from error
        except KeyboardInterrupt:
            sys.stderr.write("\nstopped; the same command goes on with the first unfinished shard\n")
            outcome.code = 130
    return outcome.code
