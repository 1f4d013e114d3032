"""Weights shared out: gathered in half precision, small frozen parts whole, compiled layers behind the hooks that gather."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from chain_parts import Chain, Stack, chain_experiment
from nursery import Nursery
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from umm_zoo.backbones.frozen import freeze
from umm_zoo.blocks.discriminators import PatchDiscriminator
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.errors import UserError
from umm_zoo.objectives.adversarial import AdversarialLoss
from umm_zoo.training.compilation import Compilation
from umm_zoo.training.sharding import FullyShardedStrategy, small_frozen


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of this process alone."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    dist.destroy_process_group()


class Watched(Chain):
    """Says in which dtype its layers compute."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.aside = Stack(4, 1)

    def parts(self) -> dict[str, torch.nn.Module]:
        return {**super().parts(), "aside": self.aside}


def test_layers_compute_in_bfloat16_and_learn_in_float32_and_small_frozen_parts_stay_whole(mesh: Any) -> None:
    method = Watched()
    method.train_only(["stack", "head"])
    calls = Compilation(["stack"], backend="eager").apply(method)["stack"]
    method._device_mesh = mesh
    before = method.stack.layers[0].linear.weight.detach().clone()  # type: ignore[union-attr]
    seen: list[torch.dtype] = []
    method.stack.layers[0].linear.register_forward_pre_hook(lambda layer, args: seen.append(layer.weight.dtype))
    FullyShardedStrategy(gathered="bfloat16").shard(method)
    assert isinstance(method.stack.layers[0], FSDPModule) and not isinstance(method.aside.layers[0], FSDPModule)
    assert not any(isinstance(weight, DTensor) for weight in method.aside.parameters())
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        method.unshard()  # type: ignore[attr-defined]
        loss = method.head(method.aside(method.stack(x))).square().mean()
    loss.backward()
    weight = method.stack.layers[0].linear.weight
    assert all(call.was_run for call in calls) and isinstance(weight, DTensor)
    assert weight.dtype == weight.grad.dtype == torch.float32 and torch.equal(weight.full_tensor(), before)  # type: ignore[union-attr]
    assert set(seen) == {torch.bfloat16} and loss.isfinite()


def test_frozen_parts_are_whole_up_to_a_size() -> None:
    method = Watched()
    method.train_only(["stack"])
    small = set(method.head.parameters()) | set(method.aside.parameters())
    assert small_frozen(method, 1) == small and small_frozen(method, 0) == set() == small_frozen(torch.nn.Linear(2, 2), 1)
    inside = freeze(torch.nn.Linear(2, 2))  # a network of a trained part, as a discriminator's encoder
    method.stack.encoder = inside
    assert small_frozen(method, 1) == small | set(inside.parameters()) and small_frozen(method, 0) == set()


def test_judges_of_shared_out_layers_are_refused_before_torch_crashes(mesh: Any) -> None:
    judge, images = PatchDiscriminator(4, 1), torch.rand(2, 3, 8, 8)
    fully_shard(judge.main[0], mesh=mesh)
    with pytest.raises(UserError, match="found R1 of a PatchDiscriminator whose layers ranks share out"):
        AdversarialLoss(r1=1.0).terms(judge, images, images, 0)
    with pytest.raises(UserError, match="found a PatchDiscriminator whose layers ranks share out, expected ddp"):
        AdversarialLoss(start=9).terms(judge, images, images, 0)


@pytest.mark.processes
def test_two_ranks_that_gather_in_bfloat16_train_as_one_that_computes_in_it(nursery: Nursery, tmp_path: Path) -> None:
    base = chain_experiment(tmp_path)
    strategy = {"_target_": "umm_zoo.training.sharding.FullyShardedStrategy", "gathered": "bfloat16"}
    for name, trainer in (("one", {}), ("two", {"strategy": strategy})):
        tree = {"base": base, "name": name, "trainer": {**trainer, "precision": "bf16-mixed", "max_steps": 3}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    assert nursery.run(tmp_path, "one.yaml")[0] == 0
    code, said = nursery.run_ranks(tmp_path, 2, "two.yaml")
    assert code == 0, said
    one, two = (load_checkpoint(tmp_path / "runs" / name)["state_dict"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key].dtype == torch.float32
        torch.testing.assert_close(two[key], value, atol=2e-2, rtol=0)
    code, said = nursery.run(tmp_path, "two.yaml", "name=three", "trainer.precision=32-true")
    assert code == 2 and "trainer.strategy.gathered: found bfloat16 under trainer.precision 32-true" in said
