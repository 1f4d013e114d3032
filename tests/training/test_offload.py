"""Frozen parts that wait on the CPU: the same losses, one of them at a time on the device, and refusals of one line."""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from toy_parts import Body, Head, Toy

from tests.methods.bridge_parts import metaquery, requests, wemmu
from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.offload import Offload
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.training.estimate import as_bytes, estimate
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup

ROWS = Batch(keys=["a", "bb"], conversations=[[], []])


class Aside(Toy):
    """The body's states are targets: no gradient passes it."""

    def training_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        x = torch.tensor([[float(len(key))] * 4 for key in batch.keys])
        with torch.no_grad():
            states = self.body(x)
        return {"loss": (self.head(states) - 1).square().mean()}


def made(kind: type[Toy] = Aside, offload: tuple[str, ...] = ("body",)) -> Toy:
    torch.manual_seed(0)
    method = kind(Body(4, 3), Head(3))
    TrainingSetup(["head"], AdamW(lr=0.1), offload=list(offload)).prepare(method)
    method.to("cpu")  # as a trainer does
    return method


def test_a_waiting_part_takes_no_memory_and_its_numbers_come_back_bit_for_bit() -> None:
    method, plain = made(), made(offload=())
    weight = method.body.linear.weight
    assert weight.shape == (3, 4) and weight.isnan().all() and weight.untyped_storage().nbytes() == 4
    loss = method.training_losses(ROWS)["loss"]
    assert method.offloaded.here == "body" and torch.equal(weight, plain.body.linear.weight)  # type: ignore[union-attr]
    assert torch.equal(loss, plain.training_losses(ROWS)["loss"])
    method.on_before_backward(loss)
    assert weight.isnan().all()
    loss.backward()
    assert method.head.linear.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_a_state_and_a_cast_are_those_of_the_numbers_that_wait() -> None:
    method, plain = made(), made(offload=())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in method.state_dict().items())
    method.load_state_dict({key: value + 1 for key, value in plain.state_dict().items()})
    assert method.body.linear.weight.isnan().all()
    method.to(torch.bfloat16)
    assert torch.equal(method.state_dict()["body.linear.weight"], (plain.body.linear.weight + 1).bfloat16())
    assert method.body.linear.weight.dtype == torch.bfloat16
    assert "body.linear.weight" in method._ddp_params_and_buffers_to_ignore


def test_a_bridge_trains_alike_while_all_but_its_decoder_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Offload, "arrive", lambda self, name, own=Offload.arrive: (came.append(name), own(self, name)))
    waiting, came, gradients = ["codec", "vision_tower", "projector", "language_model"], list[str](), list[list[torch.Tensor]]()
    for names in ([], waiting):
        method = wemmu()
        method.offload(names)
        method.to("cpu")
        torch.manual_seed(1)
        loss = method.training_losses(requests(1, 0, 2))["loss"]
        method.on_before_backward(loss)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in method.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 10 and all(map(torch.equal, *gradients))
    assert [name for name, _ in groupby(came)] == [*waiting]
    assert all(weight.isnan().all() for weight in method.offloaded.weights())  # type: ignore[union-attr]


def test_a_check_counts_the_largest_of_the_parts_that_wait() -> None:
    method = wemmu()
    setup = SimpleNamespace(offload=["codec", "language_model"], optimizer=None)
    built: Any = SimpleNamespace(method=method, data=None, setup=setup)
    held = {name: sum(4 * p.numel() for p in method.parts()[name].parameters()) for name in setup.offload}
    everything = sum(4 * tensor.numel() for tensor in [*method.parameters(), *method.buffers()])
    trained = sum(4 * p.numel() for p in method.parameters() if p.requires_grad)
    at_least, weights, less, *_ = estimate(built, cast(Any, SimpleNamespace(trainer={})), {}, False).lines
    assert f"{as_bytes(everything + trained - min(held.values()))} per process" in at_least and as_bytes(everything) in weights
    assert f"less {as_bytes(min(held.values()))}: codec, language_model wait on the CPU" in less


def test_a_frozen_pathway_passes_a_gradient_through_the_language_model() -> None:
    method = metaquery()
    method.offload(["language_model"])
    with pytest.raises(UserError, match=r"training.offload: found 'language_model', which a gradient passes"):
        method.training_losses(requests(0))


def test_what_a_gradient_passes_does_not_wait() -> None:
    with pytest.raises(UserError, match=r"training.offload: found 'head', through which a training goes"):
        made(offload=("head",))
    with pytest.raises(UserError, match=r"'bdoy', expected frozen ones.*did you mean 'body'"):
        made(offload=("bdoy",))
    method = made()
    with pytest.raises(UserError, match=r"training.offload: found 'body', which a gradient passes"):
        method.body(torch.ones(1, 4, requires_grad=True))
    adapted = Toy(Body(4, 3), Head(3))
    adapted.adapt("body", LoRA(2))
    with pytest.raises(UserError, match=r"found 'body', through which a training goes"):
        TrainingSetup(["head", "body_adapter"], AdamW(lr=0.1), offload=["body"]).prepare(adapted)
