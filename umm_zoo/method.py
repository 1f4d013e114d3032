"""Base class of methods (papers): named parts, a training loss, validation outputs, and which weights a checkpoint holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.parts import NamedParts
from umm_zoo.backbones.precomputable import Precomputable
from umm_zoo.backbones.quantized import is_quantized
from umm_zoo.batch import Batch
from umm_zoo.checkpoints.files import load_checkpoint, weights_of
from umm_zoo.errors import UserError, did_you_mean, several
from umm_zoo.experiment.build import build_method
from umm_zoo.generation.from_python import FromPython
from umm_zoo.objectives.step import StepMeans, check_finite
from umm_zoo.outputs import Outputs, TokenCounts, Wanted

#: Makes optimiser and schedule from the parameters of each trained part, in the form that Lightning takes.
MakeOptimizer = Callable[[Mapping[str, Sequence[nn.Parameter]]], Any]


class Method(NamedParts, FromPython, ABC):
    """Paper as a LightningModule over built blocks.

    A subclass implements ``parts``, ``training_losses`` and ``validation_step``. It knows no optimiser, no trainer and no file:
    ``train_only`` gives it what the ``training`` map of an experiment says.

    Checkpoints hold the parts that this stage or an earlier one trained: large frozen backbones are rebuilt from their own files.

    Attributes:
        makes: names of what ``validation_step`` makes, fields of ``Outputs`` and scalars alike; None where it does not say.
        stage_only: parts that only this stage needs; a stage that comes after it does not take them over.
        clipped_apart: parts whose gradients are clipped by a norm of their own, such as a discriminator's.
        takes_mixed: whether rows that ask for an image may stand beside others in a training batch.
        wanted: what the run's metrics and callbacks want of a validation.
        token_counts: tokens that the last training batch was made of, by kind; None where ``training_losses`` does not say.
        step: the optimiser step that is being made, over all its micro-batches and ranks.
    """

    stage_only: ClassVar[tuple[str, ...]] = ()
    clipped_apart: ClassVar[tuple[str, ...]] = ()
    takes_mixed: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # frozen parts are absent on purpose; on_load_checkpoint compares the keys itself
        self.wanted = Wanted()
        self.token_counts: TokenCounts | None = None
        self.step = StepMeans()
        self._make_optimizer: MakeOptimizer | None = None
        self._inherited: set[str] = set()  # keys that an earlier stage trained
        self._keys: dict[str, set[str]] = {}  # of state_dict, by part: taken once, for a strategy may replace the tensors later

    @property
    def makes(self) -> Collection[str] | None:
        """Names of what ``validation_step`` makes; None where the method does not say."""
        return None

    @abstractmethod
    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one training batch, each logged as ``train/<name>``; ``loss`` is the one minimised.

        A batch may be one of several micro-batches, of several ranks, of an optimiser step. A mean over anything is multiplied by
        ``share``, so that the step minimises the mean over all that it holds. Every batch gives the same names.
        """

    def units(self, batch: Batch) -> dict[str, float]:
        """How many of what ``share`` is asked for a batch holds, by name; asked before any micro-batch of a step is trained on."""
        return {"rows": len(batch)}

    def begin_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Units of the micro-batches of one optimiser step on this rank; a method that samples first does it here."""
        counts = [(self.units(batch), not batch.stands_in) for batch in batches]
        return {name: sum(own[name] * counted for own, counted in counts) for name in counts[0][0]}

    def share(self, unit: str, count: float | Tensor) -> Tensor:
        """Weight ``[]`` of a mean over ``count`` units of the batch at hand, see ``StepMeans.share``."""
        return self.step.share(unit, count, self.device)

    def over_step(self, means: Mapping[str, Tensor], unit: str, count: float | Tensor) -> dict[str, Tensor]:
        """Means over ``count`` units each, multiplied by their ``share``."""
        share = self.share(unit, count)
        return {name: value * share for name, value in means.items()}

    @abstractmethod
    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of one batch for metrics and callbacks."""

    def precomputable(self) -> dict[str, Precomputable]:
        """Outputs that ``data_pipelines.precompute`` may store, by their names in ``Batch.extras``; frozen parts only."""
        return {}

    def train_only(self, trained: Sequence[str], make_optimizer: MakeOptimizer | None = None) -> None:
        """Freeze every part not named in ``trained``; ``make_optimizer`` is called when a training starts.

        Raises:
            UserError, ValueError: see ``choose_trained``.
        """
        several("training.trained", trained)
        parts = self.choose_trained(trained)
        for name, part in parts.items():
            if name not in trained:
                freeze(part)
        self._make_optimizer = make_optimizer
        state = self.state_dict(keep_vars=True)
        for name, part in parts.items():
            inside = {id(tensor) for tensor in part.state_dict(keep_vars=True).values()}
            self._keys[name] = {key for key, tensor in state.items() if id(tensor) in inside}

    def moved(self, batch: Any) -> Batch:
        """A micro-batch that the loader has read ahead, on the device, as ``training_step`` gets it in its own turn."""
        return cast(Batch, self._apply_batch_transfer_handler(self._on_before_batch_transfer(batch)))

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a micro-batch; behind the last one of an optimiser step, log the terms of the whole step."""
        trainer, count = self.trainer, self.trainer.accumulate_grad_batches
        self.step.number = trainer.global_step
        if batch.ahead is not None:
            moved = [self.moved(other) for other in batch.ahead]
            self.step.begin(count, self.begin_step([batch, *moved]), self.device)
        elif count == 1 or trainer.fit_loop.epoch_loop.batch_progress.current.ready % count == 1:
            self.step.begin(count, None, self.device)
            if count > 1:
                rank_zero_warn("gradients accumulate, but the loader does not read whole steps: every micro-batch counts alike")
        self.token_counts = None
        with self.step.training(batch.stands_in, self.device_mesh is not None):
            losses = self.step.weighed(self.training_losses(batch))
        self.step.add(losses, batch.keys)
        if not trainer.fit_loop._should_accumulate():
            means = self.step.means(self.device, trainer.global_step + 1)
            self.log_dict({f"train/{name}": value for name, value in means.items()}, batch_size=len(batch))
            self.log("loss", means["loss"], prog_bar=True, logger=False, batch_size=len(batch))
        return losses["loss"]

    def on_before_backward(self, loss: Tensor) -> None:
        """Let the last part that waits on the CPU leave the device."""
        if self.offloaded is not None:
            self.offloaded.leave()

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule that the ``training`` map of the experiment makes.

        Raises:
            UserError: there is none.
        """
        if self._make_optimizer is None:
            raise UserError("training", "nothing", "the trained parts and an optimizer")
        parts = self.all_parts()
        self.mark_undecayed()
        return self._make_optimizer({name: [p for p in parts[name].parameters() if p.requires_grad] for name in self.trained})

    def configure_model(self) -> None:
        """Let a strategy that shares weights out over the ranks do so."""
        if self.device_mesh is not None:
            self.trainer.strategy.shard(self)  # type: ignore[attr-defined]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Update the weights, unless the losses of this step are not finite and such steps are to be skipped."""

        def closure() -> Any:
            result = optimizer_closure() if optimizer_closure is not None else None
            self.check_reached()
            if self.step.skipping:
                optimizer.zero_grad(set_to_none=True)  # an optimiser leaves alone, moments and all, what has no gradient
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm over all ranks' slices too (Lightning refuses ``norm`` under FSDP), some parts by their own."""
        root = getattr(self.trainer.strategy, "model", None)
        clip = getattr(root, "clip_grad_norm_", None)  # torch's first FSDP knows the norm of its flat parameters, nobody else does
        apart = [name for name in self.trained if name in self.clipped_apart]
        if not gradient_clip_val or gradient_clip_algorithm == "value" or (clip is None and not apart):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif clip is not None:
            clip(gradient_clip_val)
        else:
            parts = self.all_parts()
            for names in ([name for name in self.trained if name not in apart], *([name] for name in apart)):
                nn.utils.clip_grad_norm_([p for name in names for p in parts[name].parameters()], gradient_clip_val)

    # -- checkpoints ---------------------------------------------------------------------------------------------------------

    def part_keys(self, names: Iterable[str]) -> set[str]:
        """Keys of ``state_dict`` that belong to the given parts (parameters and persistent buffers)."""
        return {key for name in names for key in self._keys.get(name, ())}

    def checkpoint_keys(self) -> set[str]:
        """Keys that a checkpoint of this run holds: parts trained now, and those that earlier stages trained."""
        return self.part_keys(self.trained) | self._inherited

    def run_state(self) -> dict[str, Any]:
        """State that a resumed run needs beside weights, optimiser, random numbers and data position, on each rank of its own.

        Override it (and ``load_run_state``) in a method that keeps things between steps: rollouts of a reinforcement learner that
        are not used up, counters, a generator of its own. Plain values and tensors only, and little, for rank 0 collects them.
        """
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Take back what ``run_state`` gave on this rank. Not called where the number of ranks is another one now."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop every frozen tensor that can be rebuilt.

        Raises:
            UserError: losses or weights are not finite.
        """
        self.step.check()
        kept = self.checkpoint_keys()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
        check_finite(checkpoint["state_dict"])
        checkpoint["skips_left"] = self.step.skips_left
        checkpoint["state_keys"] = sorted(kept)  # some strategies take the weights away before on_load_checkpoint
        checkpoint["stage_only"] = sorted(self.part_keys(self.stage_only))
        trainer = self._trainer
        states: list[Any] = [own := self.run_state()]
        if trainer is not None and trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            states = [None] * trainer.world_size if trainer.is_global_zero else []
            dist.gather_object(own, states or None)
        if any(states):
            checkpoint["run_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose keys are not exactly those expected: ``strict_loading=False`` would take it silently.

        Raises:
            UserError: trained tensors are missing, or others have no place here.
        """
        saved, expected = set(checkpoint.get("state_dict") or checkpoint.get("state_keys", ())), self.checkpoint_keys()
        found = saved - (self.part_keys(self._keys) - expected)  # an earlier stage's part, frozen here
        if missing := sorted(expected - saved):
            raise UserError("checkpoint", f"{len(missing)} trained tensors are missing, such as '{missing[0]}'")
        if unexpected := sorted(found - expected):
            raise UserError("checkpoint", f"{len(unexpected)} tensors have no place in this method, such as '{unexpected[0]}'")
        self._inherited |= saved - self.part_keys(self.trained)
        self.step.resume(checkpoint.get("skips_left"))
        states = checkpoint.get("run_states", [])
        if self._trainer is not None and states:
            if len(states) == self._trainer.world_size:
                self.load_run_state(states[self._trainer.global_rank])
            else:
                rank_zero_warn(f"run_state of {len(states)} ranks is left out: there are {self._trainer.world_size} now")

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Start from the trained weights of an earlier stage (or of a finished run), and keep them in this run's checkpoints.

        Raises:
            UserError: a tensor has no place here or another shape.
        """
        own = self.state_dict()
        quantized = {name for name, parameter in self.named_parameters() if is_quantized(parameter)}
        for key, value in state.items():
            if key not in own:
                raise UserError("", f"tensor '{key}' of the earlier stage has no place in this method", hint=did_you_mean(key, own))
            if key in quantized:
                hint = "umm_zoo.export writes the part of that run as a folder, which can be loaded quantised"
                raise UserError("", f"'{key}', trained in an earlier stage", "a part that is not quantised", hint)
            if own[key].shape != value.shape:
                raise UserError("", f"'{key}' is {list(value.shape)} in the earlier stage, {list(own[key].shape)} here")
        self.load_state_dict(dict(state), strict=False)
        self._inherited |= set(state)

    @classmethod
    def load(cls, source: str | Path, trust: Sequence[str] = (), raw_weights: bool = False) -> Method:
        """Rebuild a method, in evaluation mode, from a run folder or checkpoint, with averaged weights where the run has them.

        Args:
            source: the folder or file.
            trust: modules beside this package whose classes its experiment may name: they are imported, and so run.
            raw_weights: the weights in training, in place of their averages.

        Raises:
            UserError: no checkpoint there, its experiment does not fit, or names a class that is not trusted.
            TypeError: the checkpoint holds a method of another class than this one.
        """
        checkpoint = load_checkpoint(source, mapped=True)  # the optimiser's moments stay on the disk
        method: Method = build_method(checkpoint["experiment"], source, trust)
        if not isinstance(method, cls):
            raise TypeError(f"{source}: holds a {type(method).__name__}, expected a {cls.__name__}")
        method.load_weights(weights_of(checkpoint, raw_weights)[0])
        method.use_data_of(checkpoint["experiment"], source, trust)
        return method.eval()
