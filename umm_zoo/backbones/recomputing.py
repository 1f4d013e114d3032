"""Layers that are computed again in the backward pass, under what was switched when they ran first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch.utils.checkpoint import checkpoint

#: An owner, the name of an attribute, and what it is for a time.
_Switch = tuple[Any, str, Any]
_OPEN: ContextVar[tuple[_Switch, ...]] = ContextVar("open", default=())


@contextmanager
def switched(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """The time in which an attribute is another, and any in which a layer that ran then is computed again."""
    before, token = getattr(owner, attribute), _OPEN.set((*_OPEN.get(), (owner, attribute, value)))
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)
        _OPEN.reset(token)


def as_now() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of ``torch.utils.checkpoint``, as its ``context_fn``: what a layer runs in now, and what it is computed again in."""
    return nullcontext(), _again(_OPEN.get())


@contextmanager
def _again(switches: Sequence[_Switch]) -> Iterator[None]:
    with ExitStack() as stack:
        for own in switches:
            stack.enter_context(switched(*own))
        yield


#: What the library's models take as ``gradient_checkpointing_kwargs``.
CHECKPOINTING: dict[str, Any] = {"use_reentrant": False, "context_fn": as_now}


def recomputed(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a layer makes, of which only its inputs are kept; the backward pass computes it again."""
    return checkpoint(layer, *args, **CHECKPOINTING, **kwargs)
