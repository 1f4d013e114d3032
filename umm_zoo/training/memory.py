"""Estimate of the memory that a training step's activations take: a rule of thumb, by the shapes of the trial of ``--check``.

Kept for the backward pass are, of every layer with weights (linear or convolution) that a gradient passes, its input and its
output: this is what attention, norms and activation functions between them add up to as well, within some tens of per cent
(Korthikanti et al., 2022, arXiv 2205.05198, count 34 bytes per token and channel of a 16-bit transformer layer; this rule, 32).
What the trial runs on an image is counted by the shapes met there; a layer that reads words, and one that the trial does not run,
takes the image's tokens and ``WORDS`` more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import hosts_of
from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.blocks.targets import ReconstructionTarget
from umm_zoo.method import Method
from umm_zoo.rewards.base import Reward

#: Tokens of a row's text, a generous caption or a short dialogue (our choice).
WORDS = 128
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
#: Frozen parts behind which nothing learns: they make targets, rewards and scores.
_ASIDE = (LatentCodec, FeatureEncoder, ReconstructionTarget, Reward, Method)
#: What is left of a block's activations where they are computed again: its input, about a sixteenth.
_INPUT = 1 / 16


@contextmanager
def counting(method: Method) -> Iterator[Counter[int]]:
    """For a time, the numbers that go into and come out of each layer of a method, by its ``id``: of its largest call."""
    found: Counter[int] = Counter()

    def hook(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        numbers = sum(tensor.numel() for tensor in (*given, made) if isinstance(tensor, Tensor))
        found[id(module)] = max(found[id(module)], numbers)

    hooks = [layer.register_forward_hook(hook) for layer in method.modules() if isinstance(layer, _LAYERS)]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def activation_bytes(method: Method, found: Mapping[int, int], sizes: Sequence[tuple[int, int]], rows: int, precision: str) -> int:
    """Bytes that a training step of ``rows`` rows keeps for its backward pass; 0 where nothing is known of the method's layers.

    Args:
        method: built.
        found: see ``counting``, from a trial with one image.
        sizes: heights and widths that input images may have.
        rows: of a micro-batch of one process.
        precision: of the trainer; a dtype of the weights counts where it is narrower.
    """
    tokens = WORDS
    if isinstance(vlm := getattr(method, "vlm", None), VLMBackbone):
        tokens += max((vlm.image_grid(height, width).num_cells for height, width in sizes), default=0)
    total = 0.0
    for name, part in passed_parts(method).items():
        layers = [layer for layer in part.modules() if isinstance(layer, _LAYERS)]
        reads = name == "language_model" or not any(id(layer) in found for layer in layers)
        again = _recomputed(part)
        for layer in layers:
            kept = _bytes(layer, found.get(id(layer)), tokens if reads else None, precision)
            total += kept * again.get(id(layer), 1.0)
    return int(rows * total)


def autocast_bytes(method: Method, precision: str) -> int:
    """Bytes of the 16-bit copies of float32 weights that autocast keeps until the backward pass is done with them.

    They are those of the layers that learn, and those of frozen ones that a gradient passes and that are not computed again.
    """
    if "mixed" not in precision:
        return 0
    total = 0
    for part in passed_parts(method).values():
        again = _recomputed(part)
        layers = {id(layer): layer for layer in part.modules() if isinstance(layer, _LAYERS)}
        kept = [layer.weight for key, layer in layers.items() if layer.weight.requires_grad or key not in again]
        total += sum(2 * weight.numel() for weight in kept if weight.dtype == torch.float32)
    return total


def passed_parts(method: Method) -> dict[str, nn.Module]:
    """Parts that a gradient passes, by name: the trained ones, and what stands behind the first of them but makes no target."""
    parts = method.parts()
    within = hosts_of(method.all_parts())
    hosts = {within.get(name, name) for name in method.trained}
    first = min((place for place, name in enumerate(parts) if name in hosts), default=len(parts))
    behind = list(parts.items())[first:]
    return {name: part for name, part in behind if name in hosts or (not isinstance(part, _ASIDE) and name not in within)}


def _bytes(layer: nn.Module, numbers: int | None, tokens: int | None, precision: str) -> float:
    """Bytes of one row's input and output of a layer."""
    if tokens is not None:
        width = layer.in_features + layer.out_features if isinstance(layer, nn.Linear) else 0
        numbers = tokens * width
    weight: Any = layer.weight
    return (numbers or 0) * (2 if "16" in precision else min(4, torch.finfo(weight.dtype).bits // 8))


def _recomputed(part: nn.Module) -> dict[int, float]:
    """What stays of layers whose blocks are computed again, by ``id``: the inputs of the blocks, and one block whole."""
    blocks = max((module for module in part.modules() if isinstance(module, nn.ModuleList)), key=len, default=nn.ModuleList())
    whole = any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
    again = [block for block in blocks if whole or getattr(block._compiled_call_impl, "recomputes", False)]
    return {id(layer): min(1.0, 1 / len(blocks) + _INPUT) for block in again for layer in block.modules()}
