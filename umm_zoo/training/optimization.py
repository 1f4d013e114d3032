"""Optimisers and schedules as slots: small factories that a method calls once its parameter groups are known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from umm_zoo.errors import Count, Natural, UserError, Weight

#: Numbers from 0 to below 1.
Fraction = Annotated[float, Interval(ge=0, lt=1)]


class OptimizerFactory(ABC):
    """Makes the optimiser of a method from its trained parts."""

    @abstractmethod
    def build(self, parts: Mapping[str, Sequence[nn.Parameter]]) -> Optimizer:
        """Args: parts: name of each trained part and its parameters. Returns: one optimiser with a named group per part."""

    def state_bytes(self, parameter: nn.Parameter) -> float:
        """Bytes that the optimiser keeps for a parameter between steps: two moments of its own dtype, unless a subclass says so."""
        return 2.0 * parameter.numel() * parameter.element_size()


class AdamW(OptimizerFactory):
    """Decoupled weight decay Adam (Loshchilov and Hutter, 2019, arXiv 1711.05101), one parameter group per part.

    Args:
        lr: learning rate of every part that ``part_lr`` does not name.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: applied to tensors of two or more dimensions; to all of them if ``decay_vectors``. Never to those in a module
            that says ``decayed = False``, such as a codebook: see ``NamedParts.mark_undecayed``.
        part_lr: learning rate by part name, for instance ``{denoiser: 1.0e-4}``.
        part_betas: betas by part name, for instance ``{discriminator: [0.5, 0.9]}``.
        decay_vectors: also decay biases and norm scales (our default is not to; with weight_decay 0 it does not matter).
        fused: one kernel for the whole update: the same but for rounding, in a quarter of the time on a CPU (not measured on GPUs).
            A checkpoint of either is continued with the other.

    Raises:
        ValueError: ``part_lr`` or ``part_betas`` names a part that is not trained.
        UserError: weights in float16, in which ``eps`` is 0: an update would divide by nothing.
    """

    def __init__(
        self,
        lr: Weight,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        eps: Weight = 1e-8,
        weight_decay: Weight = 0.0,
        part_lr: dict[str, Weight] | None = None,
        decay_vectors: bool = False,
        fused: bool = True,
        part_betas: dict[str, tuple[Fraction, Fraction]] | None = None,
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.part_lr, self.decay_vectors, self.fused = dict(part_lr or {}), decay_vectors, fused
        self.part_betas = dict(part_betas or {})

    def build(self, parts: Mapping[str, Sequence[nn.Parameter]]) -> Optimizer:
        """One group per part, split in two where biases, norms and codebooks are not decayed."""
        for key, given in (("part_lr", self.part_lr), ("part_betas", self.part_betas)):
            for name in given:
                if name not in parts:
                    raise ValueError(f"optimizer.{key}: found '{name}', expected the trained parts {sorted(parts)}")
        half = any(p.dtype == torch.float16 for parameters in parts.values() for p in parameters)
        if half and not torch.tensor(self.eps, dtype=torch.float16):
            found = f"{self.eps}, which is 0 in the float16 of the weights"
            raise UserError("training.optimizer.eps", found, "1e-4 or more", "or trainer.precision bf16-true or 16-mixed")
        groups = list[dict[str, Any]]()
        for name, parameters in parts.items():
            own = {"lr": self.part_lr.get(name, self.lr), "betas": tuple(self.part_betas.get(name, self.betas))}
            decayed = [p for p in parameters if (p.ndim >= 2 or self.decay_vectors) and getattr(p, "decayed", True)]
            inside = {id(p) for p in decayed}
            vectors = [p for p in parameters if id(p) not in inside]
            if decayed:
                groups.append({"params": decayed, **own, "weight_decay": self.weight_decay, "name": name})
            if vectors:
                groups.append({"params": vectors, **own, "weight_decay": 0.0, "name": f"{name} (vectors)"})
        return self.make(groups)

    def make(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimiser of finished groups."""
        made = torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=self.kernel(groups))
        made._step_supports_amp_scaling = False  # it would, but gradients could not be clipped then
        made.register_load_state_dict_pre_hook(keep_kernel)
        return made

    def kernel(self, groups: list[dict[str, Any]]) -> bool | None:
        """Torch's ``fused``: where it is wanted, and the weights stand where there is such a kernel; on ``meta`` there is none."""
        there = {parameter.device.type for group in groups for parameter in group["params"]}
        return (self.fused and there <= {"cpu", "cuda"}) or None


def keep_kernel(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to be loaded, with this optimiser's own kernels: which ones wrote it says nothing about the machine at hand."""
    own = {name: optimizer.param_groups[0].get(name) for name in ("fused", "foreach")}
    return {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bit, in blocks with a scale each, by bitsandbytes (Dettmers et al., 2022, arXiv 2110.02861).

    Arguments are those of ``AdamW``; ``fused`` changes nothing, for the library's always is. Tensors of fewer than 4,096 numbers
    keep moments of 32 bit, as the library has it. Needs the package: ``pip install bitsandbytes``.

    Raises:
        UserError: the package is missing.
    """

    def make(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The library's."""
        try:
            from bitsandbytes.optim import AdamW8bit as Library
        except ImportError as error:
            found = f"no package bitsandbytes for {type(self).__name__} ({error})"
            raise UserError("training.optimizer", found, "it to be installed", "pip install bitsandbytes") from error
        made: Optimizer = Library(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps)
        return made

    def state_bytes(self, parameter: nn.Parameter) -> float:
        """A byte per number and moment, and a scale of 32 bit per block of 256."""
        each = 1 + 4 / 256 if parameter.numel() >= 4096 else 4
        return 2.0 * parameter.numel() * each


class Schedule(ABC):
    """A learning-rate multiplier as a function of the optimiser step."""

    @abstractmethod
    def factor(self, step: int) -> float:
        """The multiplier of every group's own learning rate at ``step`` (0 is the first update)."""

    def build(self, optimizer: Optimizer) -> LambdaLR:
        """The torch scheduler, stepped once per optimiser step."""
        return LambdaLR(optimizer, self.factor)


class Constant(Schedule):
    """Linear warm-up over ``warmup_steps``, then the learning rate itself."""

    def __init__(self, warmup_steps: Natural = 0) -> None:
        self.warmup_steps = warmup_steps

    def factor(self, step: int) -> float:
        """(step + 1) / warmup_steps, at most 1."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to ``final_factor`` (Loshchilov and Hutter, 2017, arXiv 1608.03983).

    Args:
        total_steps: optimiser steps of the whole run; write ``${trainer.max_steps}``. It comes from the experiment, never from the
            trainer: reading ``estimated_stepping_batches`` makes Lightning 2.6 forget the loader's position on resume.
        warmup_ratio: share of the steps spent warming up.
        final_factor: multiplier at the end.

    Raises:
        ValueError: total_steps is not positive or warmup_ratio not in [0, 1).
    """

    def __init__(self, total_steps: Count, warmup_ratio: Fraction = 0.03, final_factor: Weight = 0.0) -> None:
        if total_steps < 1 or not 0 <= warmup_ratio < 1:
            raise ValueError(
                f"schedule: total_steps must be >= 1 and warmup_ratio in [0, 1), found {total_steps} and {warmup_ratio}"
            )
        self.total_steps, self.final_factor = total_steps, final_factor
        self.warmup_steps = math.ceil(total_steps * warmup_ratio)

    def factor(self, step: int) -> float:
        """Rises linearly from 1/warmup_steps to 1, then follows the cosine."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
