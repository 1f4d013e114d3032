"""Layers of one expert as a part of a method."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class ExpertPart(nn.Module):
    """Layers that stand elsewhere, side by side with another expert's, under their names; nobody calls it.

    Registered where they stand, they are in checkpoints once: keep this out of the modules that are.

    Args:
        layers: by path, such as ``layers.0.self_attn.q_proj``.
        stack: where they stand.
    """

    def __init__(self, layers: Mapping[str, nn.Module], stack: nn.Module) -> None:
        super().__init__()
        self._stack = (stack,)  # in a tuple: registered, it would bring the other expert with it
        for path, layer in layers.items():
            *above, name = path.split(".")
            owner: nn.Module = self
            for step in above:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.add_module(name, layer)

    @property
    def stack(self) -> nn.Module:
        """The layers that are run."""
        return self._stack[0]
