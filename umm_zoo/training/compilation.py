"""Parts of a method compiled by torch for its training steps: ``training.compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from umm_zoo.blocks.expert_part import ExpertPart
from umm_zoo.blocks.pathways import QueryPathway
from umm_zoo.errors import UserError, did_you_mean, several
from umm_zoo.method import Method
from umm_zoo.training.sharding import sharded_blocks

#: Graphs of one block before torch gives up: a block has one per kind of shape and per place where gradients start (ours have 6).
_MOST_GRAPHS = 32


class Compilation:
    """What of a method is compiled, and how; a list of names under ``training.compile`` stands for one with the defaults.

    Of a part with layers each layer is compiled by itself: one graph serves them all, which costs seconds where a whole network
    costs minutes, and stands under activation checkpointing, LoRA and ``FullyShardedStrategy`` alike. Of others the ``forward`` is.
    It holds for what runs with gradients; validation, sampling and a frozen model that encodes a prompt run as they are, for caches
    grow there from call to call. The weights stay where they are: keys of checkpoints and exports are those without.

    What does not trace whole is refused at the first step, in one line, and so is a part that no training step runs with gradients,
    by ``--check`` too where the data is there.
    Not run on a GPU by us.

    Args:
        parts: names.
        mode: of ``torch.compile``; ``reduce-overhead`` records CUDA graphs, ``max-autotune`` tries out kernels.
        dynamic: whether sizes are variables from the first step on; None lets torch find out which ones change, at the price of up
            to three graphs each, of which the first ones are faster.
        backend: ``inductor`` generates code and needs a C++ compiler on the CPU; the others are for looking for faults.
    """

    def __init__(
        self,
        parts: Sequence[str],
        mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default",
        dynamic: bool | None = None,
        backend: Literal["inductor", "aot_eager", "eager"] = "inductor",
    ) -> None:
        several("training.compile", parts)
        self.parts = list(parts)
        self.settings: dict[str, Any] = {"dynamic": dynamic, "backend": backend, "fullgraph": True, "recompile_limit": _MOST_GRAPHS}
        if mode != "default" and backend == "inductor":
            self.settings["mode"] = mode

    def check(self, method: Method, waiting: Iterable[str] = ()) -> None:
        """Refuse names that are no parts, adapters, and parts that are ``waiting`` on the CPU.

        Raises:
            UserError: names it.
        """
        parts, whole = method.all_parts(), method.parts()
        for name in self.parts:
            if name not in parts:
                expected = f"parts of {', '.join(sorted(whole))}"
                raise UserError("training.compile", f"'{name}'", expected, did_you_mean(name, whole))
            if name not in whole:
                raise UserError("training.compile", f"'{name}'", "the part that the adapter stands in: it is compiled with it")
            if name in waiting:
                raise UserError("training.compile", f"'{name}', which training.offload names too", "one of the two")

    @contextmanager
    def idle(self, method: Method) -> Iterator[set[str]]:
        """Parts that are to be compiled and that nothing has run with gradients; those that it does run fall out."""
        parts, left = method.parts(), set(self.parts)

        def note(name: str) -> None:
            if torch.is_grad_enabled():
                left.discard(name)

        hooks = [
            block.register_forward_pre_hook(lambda *_, name=name: note(name))
            for name in self.parts
            for block in blocks_of(parts[name])
        ]
        try:
            yield left
        finally:
            for hook in hooks:
                hook.remove()

    def apply(self, method: Method) -> dict[str, list[_CompiledCall]]:
        """Compile, in place; what is called from now on, by part."""
        parts = method.parts()
        return {name: [self._compiled(name, block) for block in blocks_of(parts[name])] for name in self.parts}

    def _compiled(self, name: str, block: nn.Module) -> _CompiledCall:
        run = torch.compile(block._call_impl, **self.settings)
        call = _CompiledCall(name, block._call_impl, run)
        if getattr(block._compiled_call_impl, "recomputes", False):  # of checkpointing, which stands around it
            block._compiled_call_impl.run = call  # type: ignore[union-attr]
        else:
            block._compiled_call_impl = call
        return call


class _CompiledCall:
    """Call of a module: compiled where gradients are kept, as it is otherwise. ``nn.Module`` leaves it out of copies and files."""

    def __init__(self, part: str, plain: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        self.part, self.plain, self.compiled, self.was_run = part, plain, compiled, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        self.was_run = True
        try:
            return self.compiled(*args, **kwargs)
        except TorchDynamoException as error:
            raise UserError("training.compile", f"'{self.part}', {_reason(error)}", "parts that torch traces whole") from error


class CompiledParts(Callback):
    """Compiles before the first step, and looks behind it whether all of it has run."""

    def __init__(self, compilation: Compilation) -> None:
        self.compilation = compilation
        self._calls: dict[str, list[_CompiledCall]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile, before a strategy shares the weights out."""
        if isinstance(pl_module, Method) and not self._calls:
            self._calls = self.compilation.apply(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Refuse a part that has not run."""
        calls, self._calls = self._calls, {"": []} if self._calls else {}
        refuse_idle(name for name, own in calls.items() if name and not any(call.was_run for call in own))


def refuse_idle(names: Iterable[str]) -> None:
    """Refuse to compile what no training step runs.

    Raises:
        UserError: names the first.
    """
    for name in sorted(names):
        raise UserError("training.compile", f"'{name}', which no training step runs with gradients", "parts that learn")


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """Layers of a part, those that it borrows included; the part itself where it has none."""
    return sharded_blocks(part.stack if isinstance(part, QueryPathway | ExpertPart) else part) or [part]


def _reason(error: TorchDynamoException) -> str:
    """What torch says, and of which line."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    stack = getattr(error, "real_stack", None)
    place = f" at {stack[-1].filename}:{stack[-1].lineno}" if stack else ""
    return f"which does not compile{place} ({said})"
