"""What ships with the package, by name: ``umm_zoo:llava/shapes.yaml`` an experiment, ``umm_zoo:tiny/weights/tower`` a part.

A checkout has them in ``experiments``; a wheel carries them inside the package. Such a name means the same on every machine, so
that an experiment which was stored with its weights still finds the parts that it was built from.
"""

from __future__ import annotations

import os
from pathlib import Path

from umm_zoo.errors import UserError, did_you_mean

PREFIX = "umm_zoo:"
_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder() -> Path:
    """The folder of what ships: inside the package where it was installed from a wheel, else the checkout's ``experiments``."""
    inside = _PACKAGE / "shipped"
    return inside if inside.is_dir() else _PACKAGE.parent / "experiments"


def located(name: str | Path, folder: str | Path = "") -> Path:
    """The path that a name means: of what ships, or relative to ``folder``.

    Raises:
        UserError: nothing of that name ships.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(folder) / text
    own = text.removeprefix(PREFIX)
    path = shipped_folder() / own
    inside = bool(own) and not own.startswith("/") and ".." not in Path(own).parts
    if not inside or not path.exists():
        meant = did_you_mean(path.name, [place.name for place in path.parent.glob("*")]) if inside else ""
        raise UserError(text, "nothing of that name", f"a file or folder of {shipped_folder()}/", meant)
    return Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
