"""Imports of large libraries without the garbage collector, which would search what they make again and again."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

#: Modules that make up a large library.
_MANY = 100


@contextmanager
def importing() -> Iterator[None]:
    """Around imports: the garbage collector waits, and does not search what a large library has made afterwards.

    Modules and classes stay to the end, so a search finds nothing in them: it takes a third of a start, and as much of an end.
    ``scipy.signal`` is not run before somebody uses it.
    """
    defer("scipy.signal", hamming=_hamming)
    works, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - before > _MANY:
            gc.freeze()
        if works:
            gc.enable()


class _Deferred(ModuleType):
    """Module that is run when a name is asked of it that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        if self.__class__ is _Deferred and not name.startswith("__"):
            self.__class__ = ModuleType  # type: ignore[assignment]
            given = {key: value for key, value in vars(self).items() if not key.startswith("__")}
            self.__loader__.exec_module(self)  # type: ignore[union-attr]
            vars(self).update({key: value for key, value in given.items() if key not in vars(self)})
            return getattr(self, name)
        raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")


def defer(name: str, **given: Any) -> None:
    """Let the import of a module do nothing until one of its names is used, other than those given here."""
    package, _, last = name.rpartition(".")
    if name in sys.modules or (spec := find_spec(name)) is None:
        return
    module = _Deferred(name)
    module.__spec__, module.__loader__, module.__path__ = spec, spec.loader, list(spec.submodule_search_locations or ())
    vars(module).update(given)
    sys.modules[name] = module
    setattr(sys.modules[package], last, module)


def _hamming(*arguments: Any, **named: Any) -> Any:
    """What torchmetrics imports ``scipy.signal`` for, in half a second: a name that SciPy has moved, for a library of others."""
    return sys.modules["scipy.signal"].windows.hamming(*arguments, **named)


atexit.register(gc.freeze)  # nor at the end of the process, which frees everything
