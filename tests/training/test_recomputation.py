"""Activation checkpointing by policy: which layers are computed again, the same gradients, and what ``auto`` takes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from chain_parts import Chain, Layer

from tests.methods.bridge_parts import metaquery
from umm_zoo.blocks.pathways import FrozenPathway
from umm_zoo.training import estimate, recomputation
from umm_zoo.training.compilation import Compilation
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.recomputation import recompute
from umm_zoo.training.setup import TrainingSetup


def calls(every: int, compiled: bool = False) -> tuple[list[int], list[torch.Tensor]]:
    """How often each layer's linear was called in a step, and the gradients."""
    torch.manual_seed(0)
    method = Chain(4, 3)
    TrainingSetup(["stack", "head"], AdamW(0.1), checkpointing=every).prepare(method)
    made = Compilation(["stack"], backend="eager").apply(method)["stack"] if compiled else []
    counts: Counter[int] = Counter()
    for number, layer in enumerate(method.stack.layers):
        cast(Layer, layer).linear.register_forward_hook(lambda *_, number=number: counts.update([number]))
    method.head(method.stack(torch.ones(2, 4))).sum().backward()
    assert all(call.was_run for call in made)
    return [counts[number] for number in range(3)], [cast(torch.Tensor, weight.grad) for weight in method.stack.parameters()]


def test_every_so_manyth_layer_is_computed_again_to_the_same_gradients() -> None:
    none, second, every = calls(0), calls(2), calls(1)
    assert (none[0], second[0], every[0]) == ([1, 1, 1], [2, 1, 2], [2, 2, 2])
    for _, gradients in (second, every):
        assert all(torch.equal(*pair) for pair in zip(gradients, none[1], strict=True))


def test_it_stands_around_what_is_compiled() -> None:
    plain, compiled = calls(1), calls(1, compiled=True)
    for mine, theirs in zip(compiled[1], plain[1], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_it_takes_the_place_of_what_the_parts_say_and_reaches_layers_that_are_borrowed() -> None:
    method = metaquery(pathway=FrozenPathway(gradient_checkpointing=True))
    method.decoder.model.enable_gradient_checkpointing()
    recompute(method, 2)
    assert not method.pathway.gradient_checkpointing and not method.decoder.model.gradient_checkpointing
    chosen = [
        [layer._compiled_call_impl is not None for layer in own]
        for own in (method.pathway.stack.layers, method.decoder.model.transformer_blocks)
    ]  # type: ignore[union-attr]
    assert chosen == [[True, False], [True, False]]


@pytest.mark.parametrize(
    ("memory", "every", "said"), [(1000, 0, "no layer"), (500, 2, "every second layer"), (400, 1, "every layer"), (9, 1, "every")]
)
def test_auto_takes_the_first_that_fits(memory: int, every: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([700, 300, 200])
    monkeypatch.setattr(recomputation, "device_bytes", lambda: memory)
    monkeypatch.setattr(estimate, "device_bytes", lambda: memory)
    monkeypatch.setattr(estimate, "build_experiment", lambda experiment: SimpleNamespace(method=Chain(4, 2), data=None))
    monkeypatch.setattr(estimate, "try_experiment", lambda *_: None)
    monkeypatch.setattr(estimate, "estimate", lambda *_, **__: estimate.Estimate(100, next(steps), []))
    experiment = cast(Any, SimpleNamespace(trainer={}, file=""))
    found, line = estimate.choose_checkpointing(experiment)
    assert found == every and line.startswith(f"training.checkpointing: auto: {said}")
