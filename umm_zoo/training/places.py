"""Places in the experiment of the objects in whose code an error was raised: callbacks, metrics and loggers by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Names under which an object stands in its own functions, and in the loops that call it.
_NAMES = ("self", "callback", "metric", "logger")
#: Functions of a method; what is raised below them is not of a callback that made the trainer call them.
_STEPS = ("training_step", "validation_step")


def place_of(error: BaseException, owners: Mapping[str, Any]) -> str:
    """The place of the object whose code, or whose call, raised an error; empty where it is none of the ``owners``.

    The frames of the traceback say it for every hook there is, those included that a later version of a library adds.
    """
    place, trace = "", error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name in _STEPS:
            place = ""
        seen = [frame.f_locals[name] for name in _NAMES if name in frame.f_locals]
        place = next((name for name, owner in owners.items() if any(owner is own for own in seen)), place)
        trace = trace.tb_next
    return place
