"""Progress of a long call, on a terminal. Nothing here imports torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int, prints: bool = False) -> Iterator[Callable[[], None]]:
    """A bar on stderr with how many results are there and the time left; the function that it gives advances it.

    There is none where stderr is no terminal, or where results ``prints`` to the same one.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
    disabled = not console.is_terminal or (prints and sys.stdout.isatty())
    with Progress(*columns, console=console, disable=disabled, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
