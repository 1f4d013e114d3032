"""What every method (paper) shares: named parts, which of them are trained, how they are optimised, saved and loaded."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor, nn

from umm_zoo.batch import Batch
from umm_zoo.frozen import FrozenBackbone, freeze
from umm_zoo.optimization import OptimizerFactory, Schedule


class Method(LightningModule, ABC):
    """A paper as a LightningModule over built blocks.

    A subclass stores its blocks, then calls ``self.train_only(...)`` as the last line of its constructor. It implements ``parts``,
    ``training_losses`` and ``validation_step``; the latter returns a dict of what its metrics need (see ``callbacks/metrics.py``).

    Checkpoints hold the trained parts and those that an earlier stage of the curriculum trained, and nothing else: large frozen
    backbones are rebuilt from their own files.

    Attributes:
        left_behind: parts that only this stage needs; a stage that comes after it does not take them over.
    """

    left_behind: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # frozen parts are absent on purpose; on_load_checkpoint compares the keys itself
        self.trained: list[str] = []
        self._carried: set[str] = set()

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The named parts; together they hold every parameter of the method exactly once."""

    @abstractmethod
    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one training batch, each logged as ``train/<name>``; ``loss`` is the one minimised."""

    def train_only(self, trained: list[str], optimizer: OptimizerFactory, schedule: Schedule | None) -> None:
        """Freeze every part not named in ``trained`` and remember how the others are optimised.

        Raises:
            ValueError: a name is not a part, or a parameter stands in no part or in two.
        """
        parts = self.parts()
        for name in trained:
            if name not in parts:
                close = difflib.get_close_matches(name, parts, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise ValueError(f"method.trained: found '{name}', accepted are {sorted(parts)}{hint}")
        seen: dict[int, str] = {}
        for name, part in parts.items():
            for parameter in part.parameters():
                if seen.setdefault(id(parameter), name) != name:
                    raise ValueError(f"{type(self).__name__}.parts: '{seen[id(parameter)]}' and '{name}' share a parameter")
        for key, parameter in self.named_parameters():
            if id(parameter) not in seen:
                raise ValueError(f"{type(self).__name__}.parts: parameter '{key}' stands in no part")
        for name, part in parts.items():
            if name not in trained:
                freeze(part)
        self.trained = list(trained)
        self._optimizer, self._schedule = optimizer, schedule

    # -- training ------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log every term, return the loss."""
        losses = self.training_losses(batch)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=len(batch))
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=len(batch))
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        """The optimiser of the experiment over one group per trained part, and its schedule, stepped per update."""
        parts = self.parts()
        trained = {name: [p for p in parts[name].parameters() if p.requires_grad] for name in self.trained}
        optimizer = self._optimizer.build(trained)
        if self._schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._schedule.build(optimizer), "interval": "step"},
        }

    # -- checkpoints ---------------------------------------------------------------------------------------------------------

    def _part_keys(self, names: list[str]) -> Iterator[str]:
        """Keys of ``state_dict`` that belong to the given parts (parameters and persistent buffers)."""
        parts = self.parts()
        inside = {id(tensor) for name in names for tensor in _persistent(parts[name])}
        for key, tensor in self.state_dict(keep_vars=True).items():
            if id(tensor) in inside:
                yield key

    def kept_keys(self) -> set[str]:
        """Keys that a checkpoint of this run holds: parts trained now, and what was carried over from earlier stages."""
        return set(self._part_keys(self.trained)) | self._carried

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop every frozen tensor that can be rebuilt."""
        kept = self.kept_keys()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
        checkpoint["left_behind"] = sorted(self._part_keys(list(self.left_behind)))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose keys are not exactly those expected: ``strict_loading=False`` would take it silently."""
        found, expected = set(checkpoint["state_dict"]), self.kept_keys()
        found -= {key for key in found - expected if key in self.state_dict()}  # an earlier stage's part, frozen here
        if missing := sorted(expected - set(checkpoint["state_dict"])):
            raise ValueError(f"checkpoint: {len(missing)} trained tensors are missing, such as '{missing[0]}'")
        if unexpected := sorted(found - expected):
            raise ValueError(f"checkpoint: {len(unexpected)} tensors have no place in this method, such as '{unexpected[0]}'")
        self._carried |= set(checkpoint["state_dict"]) - set(self._part_keys(self.trained))

    def carry(self, state: Mapping[str, Tensor]) -> None:
        """Start from the trained weights of an earlier stage (or of a finished run), and keep them in this run's checkpoints.

        Raises:
            ValueError: a tensor has no place here or another shape.
        """
        own = self.state_dict()
        for key, value in state.items():
            if key not in own:
                close = difflib.get_close_matches(key, own, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise ValueError(f"after: tensor '{key}' of the earlier stage has no place in this method{hint}")
            if own[key].shape != value.shape:
                raise ValueError(f"after: '{key}' is {list(value.shape)} in the earlier stage, {list(own[key].shape)} here")
        self.load_state_dict(dict(state), strict=False)
        self._carried |= set(state)

    @classmethod
    def load(cls, source: str | Path) -> Method:
        """Rebuild a method from a run folder or a checkpoint file, in evaluation mode.

        Args:
            source: ``runs/<name>`` or a ``.ckpt`` file; the resolved experiment is read from inside the checkpoint.

        Raises:
            FileNotFoundError: no checkpoint there.
            TypeError: the checkpoint holds a method of another class than the one asked for.
        """
        from umm_zoo.build import build  # strings become classes there; a method itself never needs it
        from umm_zoo.experiment import use_folders

        checkpoint = load_checkpoint(source)
        use_folders(checkpoint.get("folders", []))
        method = build(checkpoint["experiment"]["method"])
        if not isinstance(method, cls):
            raise TypeError(f"{source}: holds a {type(method).__name__}, asked for a {cls.__name__}")
        method.carry(checkpoint["state_dict"])
        return method.eval()


def _persistent(module: nn.Module) -> Iterator[Tensor]:
    yield from module.state_dict(keep_vars=True).values()


def checkpoint_path(source: str | Path) -> Path:
    """The checkpoint file of a run folder (``checkpoints/last.ckpt``), or the file itself.

    Raises:
        FileNotFoundError: neither exists.
    """
    source = Path(source)
    path = source / "checkpoints" / "last.ckpt" if source.is_dir() else source
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no checkpoint found (looked for {path})")
    return path


def load_checkpoint(source: str | Path) -> dict[str, Any]:
    """Read a checkpoint of a run folder or file without unpickling objects (``weights_only``).

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: the file is something else, or cut short.
    """
    path = checkpoint_path(source)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a reader of pickles stumbles over in a foreign file is of any class
        raise ValueError(f"{path}: found a file that cannot be read as a checkpoint ({type(error).__name__})") from error
    return checkpoint


__all__ = ["FrozenBackbone", "Method", "checkpoint_path", "freeze", "load_checkpoint"]
