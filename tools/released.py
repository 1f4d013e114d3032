"""Released weights: reading their files, sorting their tensors into parts, and the checkpoint of this package made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from umm_zoo.backbones.weight_files import assert_readable
from umm_zoo.checkpoints.files import AtomicCheckpointIO
from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build
from umm_zoo.experiment.file import load_experiment

State = dict[str, Tensor]


def read_files(sources: Iterable[Path]) -> State:
    """All tensors of files (``.bin``, ``.pt``, ``.pth``, ``.safetensors``) and of folders of such files.

    Raises:
        FileNotFoundError: a source does not exist, or a folder holds no weights.
        UserError: a file cannot be read, or holds other things than tensors.
        ValueError: a tensor stands in two files.
    """
    state: State = {}
    for source in sources:
        files = [source]
        if source.is_dir():
            kinds = ("*.safetensors", "pytorch_model*.bin", "mm_*.bin", "*.pth")
            files = next(filter(None, (sorted(source.glob(kind)) for kind in kinds)), [])
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{source}: no weights found (.safetensors, .bin or .pth)")
        for file in files:
            part = _read_file(file)
            if twice := sorted(part.keys() & state.keys()):
                raise ValueError(f"{file}: {len(twice)} tensors stand in an earlier file too, such as '{twice[0]}'")
            state |= part
    return state


def _read_file(file: Path) -> State:
    expected = "a file of tensors"
    assert_readable(file)
    try:
        part: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a reader of pickles stumbles over in a foreign file is of any class
        raise UserError(file, f"what cannot be read without running its code ({type(error).__name__})", expected) from error
    part = part.get("state_dict", part) if isinstance(part, Mapping) else {"": part}
    if other := [name for name, tensor in part.items() if not isinstance(tensor, Tensor)]:
        raise UserError(file, f"'{other[0]}', which is no tensor", expected)
    return dict(part)


def sort_parts(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, State]:
    """Tensors by part, each free of its part's prefix; every part is there, some may be empty.

    Args:
        state: of a release.
        prefixes: prefix -> part.

    Raises:
        UserError: a name belongs to no part; or an adapter that has not been merged.
    """
    parts: dict[str, State] = {part: {} for part in prefixes.values()}
    unknown = []
    for name, tensor in state.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            unknown.append(name)
        else:
            parts[prefixes[prefix]][name.removeprefix(prefix)] = tensor
    expected = f"names that begin with {', '.join(prefixes)}"
    if unknown:
        raise UserError(
            "weights", f"{len(unknown)} names that no part of the release has, such as '{sorted(unknown)[0]}'", expected
        )
    if adapted := sorted(name for name in state if ".lora_A." in name):
        raise UserError("weights", f"an adapter ('{adapted[0]}')", "weights that it has been merged into")
    return parts


def assert_fills(where: str, state: Mapping[str, Tensor], block: nn.Module) -> None:
    """Refuse tensors that do not fill a block exactly.

    Raises:
        UserError: names are missing or unknown, or a shape is another one.
    """
    _compare(where, state, {name: tensor.shape for name, tensor in block.state_dict().items()})


def write_checkpoint(state: State, experiment: Path | None, out: Path | None) -> None:
    """A checkpoint of tensors under the names of a method, with the experiment that it is to hold, if any.

    Raises:
        UserError: the tensors of a part are not those of the experiment's; the file cannot be written.
    """
    checkpoint: dict[str, Any] = {"state_dict": state, "global_step": 0}  # of a run of this package, none was made
    if experiment is not None:
        read = load_experiment(experiment, [])
        with torch.device("meta"):
            own = build(read.method, "method").state_dict()
        parts = {name.split(".")[0] for name in state}
        shapes = {name: tensor.shape for name, tensor in own.items() if name.split(".")[0] in parts}
        _compare(str(experiment), state, shapes)
        checkpoint["experiment"] = read.resolved()
    if out is not None:
        AtomicCheckpointIO().save_checkpoint(checkpoint, out)


def _compare(where: str, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    for found, kind in ((expected.keys() - state.keys(), "missing"), (state.keys() - expected.keys(), "too many")):
        if found:
            raise UserError(where, f"{len(found)} tensors {kind} in the weights, such as '{sorted(found)[0]}'")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise UserError(where, f"'{name}' of {list(state[name].shape)} in the weights", f"{list(shape)}")


def count(state: Mapping[str, Tensor]) -> str:
    """``12 tensors, 3,456 parameters``, or that there are none."""
    return f"{len(state)} tensors, {sum(t.numel() for t in state.values()):,} parameters" if state else "none in these files"
