"""Folders that ``umm_zoo.export`` has written of a whole method, read like checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from umm_zoo.checkpoints.folder import CONTENTS, checksum
from umm_zoo.errors import UserError

#: The key of ours in the table of contents, whose name is that of diffusers.
OWN = "umm_zoo"
#: Every tensor of the method that stands in no folder of a library.
REST = "method.safetensors"


def is_exported(source: str | Path) -> bool:
    """Whether a folder is one that ``umm_zoo.export`` has written of a whole method."""
    try:
        return OWN in json.loads((Path(source) / CONTENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def files_of(folder: Path) -> dict[str, dict[str, int]]:
    """Sizes and checksums of what a method is read from: every file in the folders of its parts, and the rest of its tensors."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and (file.parent != folder or file.name == REST))
    return {file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "crc32": checksum(file)} for file in files}


def read_exported(folder: Path) -> dict[str, Any]:
    """The checkpoint that the folder stands for: its experiment with the parts' own folders, and the tensors beside them.

    Raises:
        UserError: a file is missing or is not what was written, or a part would come from elsewhere.
    """
    from safetensors.torch import load_file

    own = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))[OWN]
    for name, entry in own["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["size"] or checksum(file) != entry["crc32"]:
            raise UserError(folder, f"'{name}' that is missing or is not what was written", "the folder as it was exported")
    experiment = copy.deepcopy(own["experiment"])
    for path, name in own["parts"].items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(folder, f"a part in '{name}'", "a folder inside")
        node = node_at(experiment["method"], path.split("."))
        node["source"] = str(folder / name)
        if isinstance(template := node.get("template"), Mapping) and "source" in template:
            node["template"] = {**template, "source": str(folder / name)}
    kept = {key: own[key] for key in ("adapters", "global_step", "weights", "version") if key in own}
    return {**kept, "experiment": experiment, "exported": True, "state_dict": load_file(folder / REST)}


def node_at(node: Mapping[str, Any], path: Iterable[str]) -> Any:
    """The node below another one."""
    for name in path:
        node = node[name]
    return node
