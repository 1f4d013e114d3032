"""Interpolation: every ``${key}`` of an experiment filled in, or named where it leads to nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from umm_zoo.errors import Problem, UserError, did_you_mean


def interpolated(tree: dict[str, Any], file: str | Path) -> dict[str, Any]:
    """The tree with everything filled in.

    Raises:
        UserError: names every interpolation that leads to nothing, and every value that is still to be given.
    """
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
