"""Parts that stay as they are: frozen by type, so that no later ``train()`` or loop over names can wake them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


class FrozenBackbone(nn.Module):
    """Mixin of the class of every frozen part.

    One ``model.train()`` (Lightning calls it before every fit and after every validation) would otherwise wake dropout and the
    running statistics of BatchNorm for the whole run.
    """

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)


def rest(module: nn.Module) -> None:
    """Take the gradient from a module that no loss reaches, and keep adapters away: DistributedDataParallel would wait for them."""
    module.requires_grad_(False)
    for layer in module.modules():
        layer.rests = True  # type: ignore[assignment]


def rest_unused(tower: nn.Module, feature_layers: Sequence[int]) -> None:
    """Let what no state of these layers of a tower depends on rest, see ``rest``.

    Args:
        tower: a CLIP's, SigLIP's or InternVL's.
        feature_layers: numbers of its states, 0 before the first layer, negative from behind.
    """
    encoder = cast(Any, tower).encoder
    layers = encoder.layer if hasattr(encoder, "layer") else encoder.layers
    for layer in layers[max(number % (len(layers) + 1) for number in feature_layers) :]:
        rest(layer)
    for name in ("post_layernorm", "head"):  # they make the pooled vector
        if hasattr(tower, name):
            rest(getattr(tower, name))


@cache
def _frozen_class(kind: type[nn.Module]) -> type[nn.Module]:
    # transformers looks up by str(class) whether a model can give its hidden states; another qualified name would get None silently
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(f"Frozen{kind.__name__}", (FrozenBackbone, kind), names)


def freeze(module: M) -> M:
    """Freeze ``module`` in place: no gradients, evaluation mode for good, and ``isinstance(module, FrozenBackbone)``.

    The class of the object changes rather than a wrapper being put around it, because libraries reach into their own sub-modules by
    attribute path (``model.vision_tower.config`` …).
    """
    module.requires_grad_(False)
    if isinstance(module, (nn.ModuleDict, nn.ModuleList)):  # may only group modules that are registered elsewhere
        for child in module.children():
            freeze(child)
    if not isinstance(module, FrozenBackbone):
        module.__class__ = cast(type[M], _frozen_class(cast(Any, type(module))))
    module.eval()
    return module
