"""What every method (paper) shares: named parts, which of them are trained, how they are optimised, saved and loaded."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from umm_zoo.backbones.frozen import FrozenBackbone, freeze
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.batch import Batch
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.checkpoints.folder import checkpoint_path
from umm_zoo.errors import UserError
from umm_zoo.training.optimization import OptimizerFactory, Schedule


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
        self._keys: dict[str, set[str]] = {}  # of state_dict, by part: taken once, for a strategy may replace the tensors later
        self._whole = False  # whether sharded weights are whole at present

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The named parts; together they hold every parameter of the method exactly once."""

    @abstractmethod
    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one training batch, each logged as ``train/<name>``; ``loss`` is the one minimised."""

    def precomputable(self) -> dict[str, Precomputable]:
        """What ``data_pipelines.precompute`` may store beside the data, by its name in ``Batch.extras``; frozen parts only."""
        return {}

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
                raise ValueError(f"method.trained: found '{name}', expected {sorted(parts)}{hint}")
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
        state = self.state_dict(keep_vars=True)
        for name, part in parts.items():
            inside = {id(tensor) for tensor in part.state_dict(keep_vars=True).values()}
            self._keys[name] = {key for key, tensor in state.items() if id(tensor) in inside}

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

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm over all ranks' slices too: Lightning refuses ``norm`` under FSDP."""
        root = getattr(self.trainer.strategy, "model", None)
        clip = getattr(root, "clip_grad_norm_", None)  # torch's first FSDP knows the norm of its flat parameters, nobody else does
        if clip is not None and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # -- sharding ------------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Share the weights out over the ranks where the strategy is ``umm_zoo.training.sharding.FullyShardedStrategy``."""
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.sharded_blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)
        register_fsdp_forward_method(self, "training_step")
        register_fsdp_forward_method(self, "validation_step")

    def sharded_blocks(self) -> list[nn.Module]:
        """Modules whose weights are gathered only while they compute; everything else is gathered for the whole step.

        Elements of the outermost ``ModuleList``s, such as the layers of a transformer. A block must be called through its
        ``forward`` and share no parameter with the rest; override this where that does not hold.
        """
        owners: dict[int, int] = {}
        for _, parameter in self.named_parameters(remove_duplicate=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        blocks: list[nn.Module] = []
        inside: set[int] = set()
        for module in self.modules():  # parents come first
            if not isinstance(module, nn.ModuleList) or id(module) in inside:
                continue
            inside |= {id(child) for child in module.modules()}
            for block in module:
                parameters = list(block.parameters())
                if parameters and all(owners[id(p)] == 1 for p in parameters) and not isinstance(block, nn.ModuleList):
                    blocks.append(block)
        return blocks

    def on_validation_start(self) -> None:
        """Gather sharded weights for the whole validation: ranks may have different numbers of batches and generated tokens."""
        self.gather_weights(True)

    def on_validation_end(self) -> None:
        """Share them out again."""
        self.gather_weights(False)

    def gather_weights(self, whole: bool) -> None:
        """Make sharded weights whole on every rank until further notice, or share them out again; all ranks call it together."""
        if not isinstance(self, FSDPModule) or whole == self._whole:
            return
        self._whole = whole
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(not whole, recurse=False)
                module.unshard() if whole else module.reshard()

    # -- checkpoints ---------------------------------------------------------------------------------------------------------

    def _part_keys(self, names: Iterable[str]) -> set[str]:
        """Keys of ``state_dict`` that belong to the given parts (parameters and persistent buffers)."""
        return {key for name in names for key in self._keys.get(name, ())}

    def kept_keys(self) -> set[str]:
        """Keys that a checkpoint of this run holds: parts trained now, and what was carried over from earlier stages."""
        return self._part_keys(self.trained) | self._carried

    def run_state(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimiser, random numbers and data position, on each rank of its own.

        Override it (and ``load_run_state``) in a method that keeps things between steps: rollouts of a reinforcement learner that
        are not used up, counters, a generator of its own. Plain values and tensors only, and little, for rank 0 collects them.
        """
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Take back what ``run_state`` gave on this rank. Not called where the number of ranks is another one now."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop every frozen tensor that can be rebuilt."""
        kept = self.kept_keys()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
        checkpoint["state_keys"] = sorted(kept)  # some strategies take the weights away before on_load_checkpoint
        checkpoint["left_behind"] = sorted(self._part_keys(self.left_behind))
        trainer = self._trainer
        own = self.run_state()
        states: list[Any] = [own]
        if trainer is not None and trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            states = [None] * trainer.world_size
            dist.all_gather_object(states, own)
        if any(states):
            checkpoint["run_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose keys are not exactly those expected: ``strict_loading=False`` would take it silently."""
        saved, expected = set(checkpoint.get("state_dict") or checkpoint.get("state_keys", ())), self.kept_keys()
        found = saved - (self._part_keys(self._keys) - expected)  # an earlier stage's part, frozen here
        if missing := sorted(expected - saved):
            raise UserError("checkpoint", f"{len(missing)} trained tensors are missing, such as '{missing[0]}'")
        if unexpected := sorted(found - expected):
            raise UserError("checkpoint", f"{len(unexpected)} tensors have no place in this method, such as '{unexpected[0]}'")
        self._carried |= saved - self._part_keys(self.trained)
        states = checkpoint.get("run_states", [])
        if self._trainer is not None and states:
            if len(states) == self._trainer.world_size:
                self.load_run_state(states[self._trainer.global_rank])
            else:
                rank_zero_warn(f"run_state of {len(states)} ranks is left out: there are {self._trainer.world_size} now")

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
                raise UserError("", f"tensor '{key}' of the earlier stage has no place in this method{hint}")
            if own[key].shape != value.shape:
                raise UserError("", f"'{key}' is {list(value.shape)} in the earlier stage, {list(own[key].shape)} here")
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
        from umm_zoo.experiment.build import build  # strings become classes there; a method itself never needs it
        from umm_zoo.experiment.file import use_folders

        checkpoint = load_checkpoint(source, mapped=True)  # the optimiser's moments stay on the disk
        use_folders(checkpoint.get("folders", []))
        method = build(checkpoint["experiment"]["method"])
        if not isinstance(method, cls):
            raise TypeError(f"{source}: holds a {type(method).__name__}, asked for a {cls.__name__}")
        method.carry(checkpoint["state_dict"])
        return method.eval()


__all__ = ["FrozenBackbone", "Method", "checkpoint_path", "freeze", "load_checkpoint"]
