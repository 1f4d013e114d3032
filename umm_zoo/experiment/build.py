"""Objects of a checked experiment: the only place where a string becomes a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, get_args, get_origin

from huggingface_hub.errors import StrictDataclassError

from umm_zoo.errors import REFUSALS, UserError, did_you_mean, locating, several
from umm_zoo.experiment.check import check_node, slot_class
from umm_zoo.experiment.file import interpolated_embedded
from umm_zoo.experiment.reach import say_fetched
from umm_zoo.experiment.shipped import PREFIX, located
from umm_zoo.experiment.targets import Target, find_target
from umm_zoo.experiment.trust import Trust, trusting
from umm_zoo.experiment.types import TARGET, branch_for, describe, is_named_tuple, is_node, mismatches

#: Parts of an experiment whose classes are other people's, with errors of their own classes.
LIBRARIES = ("callbacks.", "metrics.", "loggers.", "trainer.")
#: What torch says of a tensor that is too large, for which it has no class.
_TOO_LARGE = ("can't allocate memory", "Storage size calculation overflowed")
#: Weights whose experiment is being built, the outermost first.
_open: ContextVar[tuple[str, ...]] = ContextVar("open", default=())


def build(node: Mapping[str, Any], path: str = "") -> Any:
    """Build a node: its arguments first, then the object. Not checked; call ``check`` on the experiment before.

    Args:
        node: a map with ``_target_``; the other keys are keyword arguments.
        path: where the node stands, for messages.

    Raises:
        UserError: no such target, or a constructor raised ValueError, TypeError, OSError, ImportError; anything at all, where it is
            that of a callback, a metric or a logger.
    """
    where = path or str(node[TARGET])
    with locating(place=where):
        target = find_target(str(node[TARGET]))
    arguments = build_arguments(target, node, path)
    try:
        return target.call(**arguments)
    except UserError as error:
        error.locate(place=where)
        raise
    except REFUSALS as error:
        raise UserError(where, f"{node[TARGET]}: {error or type(error).__name__}") from error
    except StrictDataclassError as error:  # of a library's configuration; its last line says what is wrong
        raise UserError(where, f"{node[TARGET]}: {str(error).splitlines()[-1].strip()}") from error
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in _TOO_LARGE)):
            raise UserError(where, f"{node[TARGET]}: found sizes that this machine has no memory for") from error
        if not path.startswith(LIBRARIES):
            raise
        raise UserError(where, f"{node[TARGET]}: {type(error).__name__}: {error}") from error


def build_embedded(node: Any, kind: type, path: str, source: str | Path, trust: Sequence[str] = ()) -> Any:
    """Build a node that weights hold, once all of it has been checked.

    Args:
        node: the node.
        kind: class that it must make.
        path: where it stands in the experiment.
        source: the weights, for messages.
        trust: modules beside this package whose classes it may name.

    Raises:
        UserError: it does not fit, names a class that is not trusted, or a constructor refused its arguments.
    """
    several("trust", trust)
    place = str(Path(source).resolve())
    if place in _open.get():
        raise UserError(source, "weights whose experiment loads them themselves", "others, or none")
    if "${" in repr(node):  # weights keep what stands in the environment unfilled
        node = interpolated_embedded({path: node}, source)[path]
    with trusting(trust):
        check_node(node, kind, path, Trust(embedded=True), source)
        say_fetched({path: node}, source)
        token = _open.set((*_open.get(), place))
        try:
            return build(node, path)
        finally:
            _open.reset(token)


def build_method(tree: Mapping[str, Any], source: str | Path | None = None, trust: Sequence[str] = ()) -> Any:
    """The method of an experiment, with its adapters in its parts: whatever makes a method again makes it here.

    An export names the adapters of a method inside by its place, ``renderer.bridge.decoder``.

    Args:
        tree: the keys ``method`` and ``adapters`` (in weights of an earlier version there is none) of an experiment.
        source: the weights that hold it, which may be a stranger's: it is checked first; None where that has been done.
        trust: see ``build_embedded``.

    Raises:
        UserError: see ``build``; or an adapter has no place.
    """

    def made(node: Any, path: str) -> Any:
        return build(node, path) if source is None else build_embedded(node, slot_class(path), path, source, trust)

    method = made(tree["method"], "method")
    if not isinstance(adapters := tree.get("adapters") or {}, Mapping):
        raise UserError("adapters", describe(adapters), "a map from parts to nodes")
    for part, node in adapters.items():
        with locating(place=f"adapters.{part}", refusals=REFUSALS):
            above, _, own = part.rpartition(".")
            try:
                owner = method.get_submodule(above)
            except AttributeError:
                owner = None
            if not callable(getattr(owner, "adapt", None)):
                raise UserError("", f"an adapter in '{above}'", "a part of the method", did_you_mean(part, method.parts()))
            owner.adapt(own, made(node, f"adapters.{part}"))
    return method


def build_arguments(target: Target, node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The keyword arguments of a node (or of a plain map), with every node below them built."""
    return {
        key: _build_value(value, target.hints.get(key, Any), f"{path}.{key}" if path else str(key))
        for key, value in node.items()
        if key != TARGET
    }


def _build_value(value: Any, hint: Any, path: str) -> Any:
    if is_node(value):
        return build(value, path)
    hint = branch_for(value, hint)
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if isinstance(value, Mapping):
        slot = inner[1] if len(inner) == 2 and origin is not tuple else Any
        removes_null = slot is not Any and bool(mismatches(None, slot, path))
        return {k: _build_value(v, slot, f"{path}.{k}") for k, v in value.items() if not (v is None and removes_null)}
    if isinstance(value, list):
        slots = _element_slots(origin, inner, len(value))
        items = [_build_value(v, slot, f"{path}[{i}]") for i, (v, slot) in enumerate(zip(value, slots, strict=True))]
        if is_named_tuple(origin):
            return origin(*items)
        return tuple(items) if origin is tuple else items
    if isinstance(value, str) and value.startswith(PREFIX):
        with locating(place=path):
            value = str(located(value))
    return Path(value) if isinstance(value, str) and hint is Path else value


def _element_slots(origin: Any, inner: tuple[Any, ...], size: int) -> list[Any]:
    if origin is tuple and len(inner) == size and Ellipsis not in inner:
        return list(inner)
    return [inner[0] if inner else Any] * size
