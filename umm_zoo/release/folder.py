"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from umm_zoo.checkpoints.folder import PARTIAL, sync
from umm_zoo.checkpoints.plain_files import writing
from umm_zoo.errors import UserError, note

#: Who writes a folder that is not whole yet.
_WRITER = ".writer"


@contextmanager
def new_folder(out: Path, again: bool = False) -> Iterator[Path]:
    """A folder to write in, which becomes ``out`` at the end and is removed where that does not come.

    What a killed export left is removed by the next one. ``again`` lets it take the place of an earlier export.

    Raises:
        UserError: ``out`` is there already, another export is writing it, or it cannot be written.
    """
    out = out if out.name not in ("", "..") else out.resolve()
    empty = out.is_dir() and not any(out.iterdir())
    old = out.with_name(f"{out.name}.old{PARTIAL}")
    if not out.exists() and old.exists():
        os.replace(old, out)  # a kill came between the two
    if out.is_symlink() or (out.exists() and not empty and not (again and (out / "card.json").is_file())):
        hint = "--again puts an export in the place of an earlier one" if (out / "card.json").is_file() else "name another one"
        raise UserError(out, "something that is there already", "a new folder", hint)
    if out.is_dir() and out.samefile(Path.cwd()):
        raise UserError(out, "the folder that you are in, which another one would replace", "a new folder")
    partial = out.with_name(out.name + PARTIAL)
    with writing(out, "a folder that can be written"):
        if partial.exists():
            if _is_written(partial):
                raise UserError(out, "another export that is writing it", "one at a time")
            note(f"{partial}: left by an export that was killed, removed")
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            (partial / _WRITER).write_text(str(os.getpid()))
            yield partial
            (partial / _WRITER).unlink()
            for place in [*partial.rglob("*"), partial]:
                if place.is_file():
                    with place.open("rb") as stream:
                        os.fsync(stream.fileno())
                else:
                    sync(place)
            if out.exists() and not empty:
                shutil.rmtree(old, ignore_errors=True)
                os.replace(out, old)
            os.replace(partial, out)
            sync(out.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_written(partial: Path) -> bool:
    """Whether the process that began a folder still runs."""
    try:
        os.kill(int((partial / _WRITER).read_text()), 0)
    except (OSError, ValueError):
        return False
    return True
