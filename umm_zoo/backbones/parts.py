"""Named parts of a method, and adapters that stand beside some of them as parts of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA, hosts_of
from umm_zoo.backbones.offload import Offload
from umm_zoo.backbones.quantized import find_quantized, is_quantized
from umm_zoo.errors import UserError, did_you_mean


class NamedParts(nn.Module, ABC):
    """Mixin of methods: what their parts are, which of them are trained, and which have an adapter.

    Attributes:
        trained: names of the trained parts.
        adapters: by the names of the parts that they stand in, see ``adapt``.
        offloaded: the parts that wait on the CPU, see ``offload``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[str] = []
        self.adapters = nn.ModuleDict()
        self.offloaded: Offload | None = None
        self._unreached: list[str] = []  # trained adapters that have had no gradient so far

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The named parts; together they hold every parameter of the method exactly once."""

    def all_parts(self) -> dict[str, nn.Module]:
        """``parts``, and the adapter of a part as ``<part>_adapter``: what may be trained, and what a checkpoint may hold."""
        return {**self.parts(), **{f"{name}_adapter": adapter for name, adapter in self.adapters.items()}}

    def check_trained(self, trained: Sequence[str]) -> None:
        """Refuse parts that this method never trains.

        Raises:
            UserError: ``training.trained`` names one.
        """

    def adapt(self, part: str, adapter: LoRA) -> None:
        """Let an adapter stand in a part, which stays as it is from now on; before anything is trained.

        method.adapt("language_model", LoRA(rank=16))

        Raises:
            UserError: there is no such part, or this method never trains it.
            ValueError: the part has an adapter, or no such layers.
        """
        where, parts = f"adapters.{part}", self.parts()
        if part not in parts:
            raise UserError(where, f"an adapter of '{part}'", f"one of {', '.join(parts)}", did_you_mean(part, parts))
        try:
            self.check_trained([part])
        except UserError as error:
            found = f"an adapter of '{part}', which {type(self).__name__} never trains"
            raise UserError(where, found, error.problems[0].expected, error.problems[0].hint) from error
        if self.trained:
            raise ValueError(f"{where}: found a method whose trained parts are chosen, expected adapt before train_only")
        adapter.attach(parts[part])
        if f"{part}_adapter" in parts:
            raise UserError(where, f"an adapter of '{part}', where '{part}_adapter' is a part already", "one of the two")
        self.adapters[part] = adapter

    @property
    def changing(self) -> set[str]:
        """Names of the parts whose outputs a training changes: trained ones, and those with a trained adapter."""
        return {*self.trained, *(part for part in self.adapters if f"{part}_adapter" in self.trained)}

    def choose_trained(self, trained: Sequence[str]) -> dict[str, nn.Module]:
        """All parts, once those to be trained may be.

        Raises:
            UserError: a name is not a part, one that this method never trains, a part that has an adapter, or a quantised one.
            ValueError: a parameter stands in no part or in two.
        """
        parts = self.all_parts()
        for name in trained:
            if name not in parts:
                raise UserError("training.trained", f"'{name}'", f"{sorted(parts)}", did_you_mean(name, parts))
        within = {f"{part}_adapter": part for part in self.adapters}
        self.check_trained([within.get(name, name) for name in trained])
        for adapter, host in hosts_of(parts).items():
            if host in trained:
                expected = f"'{adapter}' alone, or no adapter: the part that it stands in stays as it is"
                raise UserError("training.trained", f"'{host}', which has an adapter", expected)
        for name in trained:
            if (weight := find_quantized(parts[name])) is not None:
                expected = "a part that is not (its layers among those that the quantisation skips)"
                hint = f"an adapter of it can be trained: adapters.{name}"
                raise UserError("training.trained", f"'{name}', whose '{weight}' is quantised", expected, hint)
        seen: dict[int, str] = {}
        for name, part in parts.items():
            for parameter in part.parameters():
                if seen.setdefault(id(parameter), name) != name:
                    raise ValueError(f"{type(self).__name__}.parts: '{seen[id(parameter)]}' and '{name}' share a parameter")
        for key, parameter in self.named_parameters():
            if id(parameter) not in seen:
                raise ValueError(f"{type(self).__name__}.parts: parameter '{key}' stands in no part")
        self.trained = list(trained)
        self._unreached = [name for name in trained if isinstance(parts[name], LoRA)]
        return parts

    def mark_undecayed(self) -> None:
        """Mark the parameters of modules that say ``decayed = False``, on which an optimiser should put no weight decay."""
        for module in self.modules():
            if not getattr(module, "decayed", True):
                for parameter in module.parameters():
                    parameter.decayed = False  # type: ignore[attr-defined]

    def check_reached(self) -> None:
        """Refuse an adapter whose part has run in a training step without a gradient: it would never learn.

        Raises:
            UserError: names it.
        """
        if not self._unreached:
            return
        parts, left = self.all_parts(), list[str]()
        for name in self._unreached:
            adapter = parts[name]
            without = all(parameter.grad is None for parameter in adapter.parameters())
            if without and isinstance(adapter, LoRA) and adapter.was_run:
                part = hosts_of(parts)[name]
                found = f"'{name}', which no gradient reaches: {type(self).__name__} runs '{part}' without"
                raise UserError("training.trained", found, "an adapter of a part that is trained on")
            left += [name] if without else []
        self._unreached = left

    def offload(self, names: Sequence[str]) -> None:
        """Let frozen parts wait on the CPU while they do not compute, see ``Offload``; once the trained parts are chosen.

        Raises:
            UserError: a name is not a part, is trained, has an adapter that is, or is quantised.
        """
        parts = self.all_parts()
        for name in names:
            where, expected = "training.offload", f"frozen ones of {', '.join(sorted(parts))}"
            if name not in parts:
                raise UserError(where, f"'{name}'", expected, did_you_mean(name, parts))
            if name in self.changing:
                raise UserError(where, f"'{name}', through which a training goes", expected)
            if (weight := find_quantized(parts[name])) is not None:
                raise UserError(where, f"'{name}', whose '{weight}' is quantised", "parts with plain weights")
        if names and not any(parameter.is_meta for name in names for parameter in parts[name].parameters()):
            self.offloaded = Offload({name: parts[name] for name in names})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.offloaded is None:
            return super()._apply(fn, recurse)
        with self.offloaded.moving(fn):
            return super()._apply(fn, recurse)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of weights that DistributedDataParallel does not send from rank to rank: every rank has read them itself."""
        waiting: Any = [] if self.offloaded is None else self.offloaded.weights()
        apart = {id(parameter) for parameter in waiting}
        return [name for name, own in self.named_parameters() if id(own) in apart or is_quantized(own)]
