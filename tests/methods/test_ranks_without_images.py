"""Where weights are shared out, a rank without images, or with fewer sizes than another, takes part in every call of the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_ross
import test_unequal_bridge
import tiny_configs
import torch
from ranks import on_two_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.testing import assert_close

from tests.methods import bagel_parts, janus_parts
from umm_zoo.backbones.codecs import DCCodec
from umm_zoo.backbones.latent_codec import SOURCE_LATENTS
from umm_zoo.batch import Batch
from umm_zoo.method import Method
from umm_zoo.methods.llava import LLaVA
from umm_zoo.pretraining.autoencoder import Autoencoder
from umm_zoo.training.sharding import sharded_blocks

pytestmark = pytest.mark.processes


def llava() -> Method:
    torch.manual_seed(0)
    method = LLaVA(test_ross.backbone())
    method.train_only(["language_model"])
    return method


def ross() -> Method:
    return test_ross.build(*test_ross.VARIANTS["r-latent"]())


def janus() -> Method:
    return janus_parts.method(trained=["image_head", "language_model"], dropout=0.0)


def bridge(kind: str) -> Method:
    torch.manual_seed(0)
    method = test_unequal_bridge.bridge(kind)
    method.train_only(["connector", "decoder", *(["detail", "pathway"] if kind == "wemmu" else ["queries"])])
    return method


def autoencoder() -> Method:
    torch.manual_seed(0)
    method = Autoencoder(DCCodec.from_config(tiny_configs.DC))
    method.train_only(["codec"])
    return method


def stored() -> Batch:
    """Rows whose input images nobody need encode."""
    batch, grids = test_unequal_bridge.unequal(), ((4, 4), (2, 5), (3, 3), (5, 2))
    batch.extras[SOURCE_LATENTS] = [torch.arange(2.0 * h * w).sin().view(2, h, w) for h, w in grids]
    batch.entries[SOURCE_LATENTS] = list(batch.image_counts)
    return batch


def images_alone() -> Batch:
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 8), (8, 16), (16, 8), (8, 8), (8, 16))
    images = [torch.rand(3, *size, generator=generator) * 2 - 1 for size in sizes]
    return Batch([f"row{i}" for i in range(6)], [[] for _ in range(6)], images, [1] * 5 + [0])


#: Of each family the method, its rows, and which of them either rank has.
FAMILIES: dict[str, tuple[Callable[[], Method], Callable[[], Batch], tuple[list[int], list[int]]]] = {
    "a frozen projector": (llava, lambda: test_ross.batch((1, 2, 0)), ([0, 1], [2])),
    "ross": (ross, lambda: test_ross.batch((1, 2, 0)), ([0, 1], [2])),
    "wemmu": (lambda: bridge("wemmu"), test_unequal_bridge.unequal, ([0, 2, 3], [1])),
    "wemmu, one with both kinds, sources stored": (lambda: bridge("wemmu"), stored, ([0, 1], [2, 3])),
    "metaquery": (lambda: bridge("metaquery"), test_unequal_bridge.unequal, ([0, 2, 3], [1])),
    "janus, one kind of rows each": (janus, janus_parts.rows, ([0, 2, 4], [1, 3, 5])),
    "bagel, one kind of rows each": (bagel_parts.method, bagel_parts.rows, ([0], [1, 2, 3])),
    "autoencoder, none": (autoencoder, images_alone, ([0, 1, 2, 3, 4], [5])),
    "autoencoder, two sizes beside three": (autoencoder, images_alone, ([0, 1, 2], [3, 4])),
}


def losses_of(method: Method, batch: Batch, sharded: bool) -> dict[str, Tensor]:
    method.step.begin(1, method.begin_step([batch]), torch.device("cpu"))
    with method.step.training(sharded=sharded):
        losses = method.training_losses(batch)
    losses["loss"].backward()
    return {name: value.detach() for name, value in losses.items()}


def work_of_rank(rank: int, family: str) -> tuple[Any, Any]:
    make, rows, shares = FAMILIES[family]
    method, mesh = make(), init_device_mesh("cpu", (2,))
    for block in (blocks := sharded_blocks(method)):
        fully_shard(block, mesh=mesh)
    assert blocks
    fully_shard(method, mesh=mesh)
    register_fsdp_forward_method(method, "training_losses")
    losses = losses_of(method, rows().select(shares[rank]), True)
    return losses, {name: p.grad.full_tensor() for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_two_ranks_is_that_of_one(family: str) -> None:
    (first, found), (second, _) = on_two_ranks(work_of_rank, family)
    method = FAMILIES[family][0]()
    losses = losses_of(method, FAMILIES[family][1](), False)
    for name, value in losses.items():
        assert_close((first[name] + second[name]) / 2, value, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    expected = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
