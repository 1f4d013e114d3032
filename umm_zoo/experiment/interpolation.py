"""The interpolations of an experiment, filled in over its merged layers.

OmegaConf says what they mean. It makes an object of every value and a tree of every text, ten milliseconds for a file of ours, so
that plain values and references to keys are filled in by themselves; whatever else a file holds, and every error, is OmegaConf's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from umm_zoo.errors import Problem, UserError, did_you_mean

#: An innermost reference to a key, from the top of the experiment.
_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w\-]*(?:\.[\w\-]+)*)\}", re.ASCII)
#: References that lead to each other; further ones are OmegaConf's, who knows a circle.
_CHAIN = 20


class _BeyondReferencesError(Exception):
    """More than plain values and references to keys."""


class _References:
    """Values with the references to keys of a tree filled in.

    Raises:
        _BeyondReferencesError: they hold anything that OmegaConf would not leave as it is, or refuse.
    """

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree

    def filled(self, value: Any, chain: int = 0) -> Any:
        """A copy of a value; ``chain`` references have led to it."""
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: self.filled(child, chain) for key, child in value.items()}
        if type(value) is list:
            return [self.filled(child, chain) for child in value]
        if type(value) is str and value != "???":
            return self._text(value, chain) if "${" in value else value
        if value is None or type(value) in (int, float, bool):
            return value
        raise _BeyondReferencesError

    def _text(self, text: str, chain: int) -> Any:
        if "\\" in text or chain == _CHAIN:
            raise _BeyondReferencesError
        while match := _REFERENCE.search(text):
            value = self._at(match[1].split("."), chain + 1)
            if match[0] == text:
                return value
            if type(value) not in (str, int) or set(str(value)) & set("${}\\"):
                raise _BeyondReferencesError
            before, behind = text[: match.start()], text[match.end() :]
            if "${" in before and not (before.endswith(("{", ".")) and behind.startswith((".", "}"))):
                raise _BeyondReferencesError  # within another reference, but not a whole key of it
            text = f"{before}{value}{behind}"
        if "${" in text:
            raise _BeyondReferencesError
        return text

    def _at(self, path: list[str], chain: int) -> Any:
        here: Any = self.tree
        for key in path:
            here = self.filled(here, chain) if type(here) is str else here
            if type(here) is not dict or key not in here:
                raise _BeyondReferencesError
            here = here[key]
        return self.filled(here, chain)


@contextmanager
def _environment_unfilled() -> Iterator[None]:
    """For a time, what stands in the environment is not filled in: secrets stand there."""
    for name in ("oc.env", "oc.decode"):  # a value of the environment may be decoded

        def as_written(*arguments: Any, name: str = name) -> str:
            return f"${{{name}:{','.join(map(str, arguments))}}}"

        OmegaConf.register_resolver(name, as_written, replace=True, annotation_validation="off")
    try:
        yield
    finally:
        OmegaConf.clear_resolvers()  # back to OmegaConf's own


def interpolated(tree: dict[str, Any], file: str | Path, environment: bool = True) -> dict[str, Any]:
    """The tree with everything filled in, or everything but what stands in the environment.

    Raises:
        UserError: names every interpolation that leads to nothing, and every value that is still to be given.
    """
    if not environment:
        with _environment_unfilled():
            return interpolated(tree, file)
    with suppress(_BeyondReferencesError, RecursionError):
        return dict(_References(tree).filled(tree))
    try:
        config = OmegaConf.create(tree)
    except OmegaConfBaseException as error:
        raise unreadable(error, file) from None
    try:
        container: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError):  # the first of perhaps many
        raise UserError(file, list(_unresolved(config, "", list(_paths(tree))))) from None
    return {str(key): value for key, value in container.items()}


def unreadable(error: OmegaConfBaseException, file: str | Path) -> UserError:
    """Error text for an interpolation that is not even one."""
    reason = str(error).splitlines()[0]
    return UserError(str(error.full_key), f"an interpolation that cannot be read ({reason})", "${key}", file=file)


def _paths(tree: Any, prefix: str = "") -> Iterable[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")


def _unresolved(config: Any, where: str, known: list[str]) -> Iterable[Problem]:
    keys: Iterable[Any] = range(len(config)) if isinstance(config, ListConfig) else list(config)
    for key in keys:
        path = f"{where}[{key}]" if isinstance(config, ListConfig) else f"{where}.{key}" if where else str(key)
        try:
            value = config[key]
        except MissingMandatoryValue:
            yield Problem(path, "??? (still to be given)", f"a value, for instance on the command line as {path}=…")
        except (OmegaConfBaseException, RecursionError) as error:
            raw = OmegaConf.to_container(config, resolve=False)[key]  # type: ignore[index]
            wanted = [name for name in re.findall(r"\$\{([\w.\-]+)\}", str(raw)) if name not in known]
            reason = "" if wanted else f" ({(str(error).splitlines() or ['?'])[0]})"
            meant = did_you_mean(wanted[0], known) if wanted else ""
            yield Problem(path, f"'{raw}', which leads to nothing{reason}", "an interpolation of a key of this experiment", meant)
        else:
            if isinstance(value, (DictConfig, ListConfig)):
                yield from _unresolved(value, path, known)
