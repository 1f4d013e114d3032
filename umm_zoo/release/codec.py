"""Folder of a codec of our own blocks: what a library can load of it, every other tensor, and how it is built again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from umm_zoo.checkpoints.exported import OWN, REST, files_of, node_at
from umm_zoo.checkpoints.folder import CONTENTS
from umm_zoo.release.parts import LibraryPart, assert_whole, cast, library_parts, rest_of


def write_codec(
    codec: nn.Module,
    node: Mapping[str, Any],
    folder: Path,
    save: Callable[[LibraryPart, Path], None],
    dtype: str | None,
    said: Mapping[str, Any],
) -> list[LibraryPart]:
    """Write ``folder`` in the form of a whole method's export, the codec in the method's place; ``load_codec`` reads it.

    Args:
        codec: what is written.
        node: that built it.
        folder: a new one.
        save: writes a part into a folder of its own.
        dtype: of the other tensors; None is as they are.
        said: what else the table of contents says.

    Returns:
        The parts that have folders of their own.

    Raises:
        UserError: weights from elsewhere stand in a place that has no folder.
    """
    node, parts = copy.deepcopy(dict(node)), library_parts(node, codec)
    contents: dict[str, Any] = {"_class_name": type(codec).__name__}
    for part in parts:
        (folder / part.folder).mkdir()
        save(part, folder / part.folder)
        node_at(node, part.path[:-1])[part.path[-1]] = part.load_node(part.folder)
        network = type(part.network)
        contents[part.folder] = [network.__module__.partition(".")[0], network.__name__]
    assert_whole(node, parts)
    save_file(cast(rest_of(codec, parts), dtype), folder / REST, metadata={"format": "pt"})
    places = {".".join(part.path): part.folder for part in parts}
    contents[OWN] = {"experiment": {"method": node}, "parts": places, **said, "files": files_of(folder)}
    (folder / CONTENTS).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    return parts
