"""Networks of the diffusers library, from their config keys or from a folder, with nothing missing and nothing ignored."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from umm_zoo.backbones.loading import assert_complete, assert_known, find_source, on_meta_device, torch_dtype


def built(kind: type[Any], config: dict[str, Any], dtype: str) -> Any:
    """Random weights.

    Raises:
        ValueError: a config key is misspelt.
    """
    assert_known(f"{kind.__name__}.config", config, list(inspect.signature(kind.__init__).parameters)[1:])
    model = kind(**{key: value for key, value in config.items() if not key.startswith("_")})
    return model if dtype == "float32" else model.to(torch_dtype(dtype))


def loaded(kind: type[Any], source: str | Path, config: dict[str, Any] | None, subfolder: str | None, dtype: str) -> Any:
    """Weights of a folder or a name on the hub; on the meta device with ``config`` given nothing is read.

    Raises:
        ValueError: the weights do not fill the network exactly, or ``config`` differs from the one stored with them.
    """
    if config is not None and on_meta_device():
        return built(kind, config, dtype)
    source = find_source(source)
    model, info = kind.from_pretrained(source, subfolder=subfolder, torch_dtype=torch_dtype(dtype), output_loading_info=True)
    assert_complete(source, info)
    if config is not None:
        for key, value in config.items():
            found = model.config.get(key)
            if not key.startswith("_") and _plain(found) != _plain(value):
                raise ValueError(f"{source}: config has {key} = {found}, the experiment says {value}")
    return model


def _plain(value: Any) -> Any:
    """Lists for tuples, all the way down: YAML and JSON know no tuples."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
