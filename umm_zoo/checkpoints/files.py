"""Files of checkpoints, written so that they are whole or not there, and read without unpickling objects."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from torch import Tensor

from umm_zoo.checkpoints.background import Writer, WritesBehind
from umm_zoo.checkpoints.exported import is_exported, read_exported
from umm_zoo.checkpoints.folder import PARTIAL, checkpoint_path, damage, remove, sync
from umm_zoo.checkpoints.output import in_memory, reason, write
from umm_zoo.checkpoints.seals import seal
from umm_zoo.checkpoints.sharded import read_rest, read_sharded
from umm_zoo.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO, WritesBehind):
    """Plug-in that writes under a temporary name, reads back, flushes, renames: what has a checkpoint's name is always whole.

    Every strategy writes single files through this plug-in; the sharded one does the same for its folders.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writer = Writer()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``; where it cannot be written or read back, it is removed again and a ``UserError``."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            self.writer.wait()
            _copied(checkpoint, Path(path))()

    def begin(self, checkpoint: dict[str, Any], path: Path, then: Callable[[], None]) -> None:
        """Rank 0 alone calls this."""
        self.writer.wait()  # before there is a second copy
        write_copy = _copied(checkpoint, path)

        def write_all() -> None:
            write_copy()
            then()

        self.writer.start(write_all)

    def teardown(self) -> None:
        """Wait for the writer when the trainer ends; where that is by an error, it is the one that is said."""
        with suppress(Exception):
            self.writer.wait()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint after its checksums; a sharded one is put together, a damaged one is a ``UserError``."""
        return load_checkpoint(path)


def _copied(checkpoint: Mapping[str, Any], path: Path) -> Callable[[], None]:
    """Copy a checkpoint in memory; what writes the copy, whole or not at all."""
    try:
        content = in_memory(checkpoint)
        expected = {key: _empty(value) if key == "state_dict" else None for key, value in checkpoint.items()}
    except Exception as error:  # pickling may fail in any way
        raise UserError("checkpoint", f"{path} could not be written: {reason(error)}") from error

    def write_copy() -> None:
        partial = path.with_name(path.name + PARTIAL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write([content], partial)
            seal(partial)
            verify(partial, expected)
            os.replace(partial, path)
            sync(path.parent)
        except Exception as error:
            raise UserError("checkpoint", f"{path} could not be written: {reason(error)}") from error
        finally:
            remove(partial)  # Ctrl-C leaves none behind either

    return write_copy


def verify(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Read ``path`` back; a ``ValueError`` where a checksum is wrong, or keys, shapes or types of the weights differ."""
    if problem := damage(path):
        raise ValueError(problem)
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if found.keys() != checkpoint.keys():
        raise ValueError(f"keys {sorted(found.keys() ^ checkpoint.keys())} are missing or too many")
    if _outline(found.get("state_dict", {})) != _outline(checkpoint.get("state_dict", {})):
        raise ValueError("the weights read back are not those written")


def _empty(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to("meta") if isinstance(value, Tensor) else None for key, value in state.items()}


def _outline(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None for key, value in state.items()}


def load_checkpoint(source: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Read the checkpoint of a run folder, a checkpoint (file or sharded folder), consolidated weights, or an exported method.

    Every way to weights of a run goes through here: its checksums come first. Of a run folder the newest intact checkpoint is read.
    Nothing is unpickled but plain values and tensors (``weights_only``); ``mapped`` ones stay on the disk until they are touched.
    What is no checkpoint, or damaged, is a ``UserError``.
    """
    path = _intact(source)
    try:
        if is_exported(path):
            checkpoint = read_exported(path)
        elif path.is_dir():
            checkpoint = dict(read_sharded(path))
        elif path.suffix == ".safetensors":
            checkpoint = _read_consolidated(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        _assert_form(checkpoint)
    except UserError:
        raise
    except Exception as error:  # what a reader of pickles stumbles over in a foreign file is of any class
        why = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        expected = "a run folder or a checkpoint that umm_zoo.fit has written"
        raise UserError(path, f"a file that cannot be read as a checkpoint ({why})", expected) from error
    return checkpoint


#: Kinds of what readers of checkpoints rely on.
_FORM: dict[str, Any] = {
    "state_dict": Mapping,
    "experiment": Mapping,
    "callbacks": Mapping,
    "global_step": int,
    "adapters": Mapping,
}
_FORM |= {"stage_only": list, "history": list, "weights": str}


def _assert_form(checkpoint: Any) -> None:
    """A ``TypeError`` where what others rely on is not there, or of another kind: weights are anybody's."""
    wrong = [key for key, kind in _FORM.items() if key in checkpoint and not isinstance(checkpoint[key], kind)]
    if wrong:
        raise TypeError(", ".join(wrong))
    averages = [
        own["averages"] for own in checkpoint.get("callbacks", {}).values() if isinstance(own, Mapping) and "averages" in own
    ]
    for state in (checkpoint["state_dict"], *averages):
        if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
            raise TypeError("weights that are no tensors")


def weights_of(checkpoint: Mapping[str, Any], raw: bool = False) -> tuple[dict[str, Tensor], str]:
    """The run's weights, by one rule for every command, stage and export: the averages where the run keeps any (``training.ema``).

    Validation scores are theirs. A resumed run goes on from the raw ones, and the averages beside them.

    Args:
        checkpoint: as it was loaded.
        raw: take those in training.

    Returns:
        the state, and which it is: ``averaged`` or ``raw``.

    Raises:
        UserError: raw ones of consolidated weights that are averages.
    """
    state = dict(checkpoint["state_dict"])
    kept = checkpoint.get("callbacks", {}).values()
    averages: Mapping[str, Tensor] = next((own["averages"] for own in kept if isinstance(own, Mapping) and own.get("averages")), {})
    which = checkpoint.get("weights", "raw")
    if raw and which != "raw":
        raise UserError("--raw-weights", f"a file that holds the {which} weights alone", "the run that it was made of")
    if raw or not averages:
        return state, which
    return state | {key: value.to(state[key].dtype) for key, value in averages.items() if key in state}, "averaged"


def _intact(source: str | Path) -> Path:
    """The path of a checkpoint, once its checksums have been compared."""
    path = checkpoint_path(source)
    if not is_exported(path) and _is_ours(path) and (problem := damage(path)):
        expected = "an intact one (of the run folder the one before it is taken)"
        raise UserError(path, f"a damaged checkpoint ({problem})", expected)
    return path


def _is_ours(path: Path) -> bool:
    """Whether something has the form of what is written here; what has another is refused by those who read it."""
    if path.is_dir() or path.suffix == ".safetensors":
        return path.exists()
    with path.open("rb") as stream:
        return stream.read(2) == b"PK"


def describe(source: str | Path) -> dict[str, Any]:
    """A checkpoint whose tensors are not read (or are empty ones); errors are those of ``load_checkpoint``."""
    path = _intact(source)
    if not path.is_dir() or is_exported(path):
        return load_checkpoint(path, mapped=True)
    try:
        return read_rest(path)
    except ValueError as error:  # of an earlier version
        raise UserError(path, f"a file that cannot be read as a checkpoint ({error})", "a checkpoint of this version") from error


#: What a consolidated file holds beside the weights, as JSON in its header.
DESCRIPTION = ("experiment", "stage_only", "adapters", "global_step", "version")


def _read_consolidated(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:
        description = json.loads((file.metadata() or {}).get("umm_zoo", "null"))
        if description is None:
            raise SafetensorError("not written by tools/consolidate.py")
        return {**description, "state_dict": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118 - not a dict
