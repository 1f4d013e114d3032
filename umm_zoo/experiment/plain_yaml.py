"""YAML of plain values through libyaml, where the installed PyYAML has it: a tenth of the time, the same text and values."""

from __future__ import annotations

from typing import Any

import yaml

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def yaml_tree(text: str) -> Any:
    """The value that a text holds.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=_LOADER)


def yaml_text(tree: Any, **options: Any) -> str:
    """The text of a plain value, with the ``options`` of ``yaml.safe_dump``."""
    text: str = yaml.dump(tree, Dumper=_DUMPER, **options)
    # libyaml escapes what lies beyond 16 bits, and folds lines by their bytes
    return text if text.isascii() and "\\" not in text else str(yaml.safe_dump(tree, **options))
