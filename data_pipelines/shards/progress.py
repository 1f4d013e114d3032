"""Bars of what takes long, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from umm_zoo.errors import note, printable


@contextmanager
def progress_bar(description: str, total: int, always: bool = True) -> Iterator[Callable[..., None]]:
    """A bar on stderr; what it gives is called with a number of steps, and with another description where that changes.

    Where stderr is no terminal its end alone is printed, or without ``always`` nothing.
    """
    columns = (TextColumn("{task.description:32}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (always or console.is_terminal)) as progress:
        bar = progress.add_task(description, total=total)
        yield lambda steps, text=None: progress.update(bar, advance=steps, description=None if text is None else printable(text))


@contextmanager
def bytes_bar(what: str, size: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr; a line where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        note(f"{what} is hashed ({size / 1e9:.1f} GB)")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(printable(what), total=size, completed=done)
        yield lambda count: progress.advance(task, count)
