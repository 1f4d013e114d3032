"""What methods make of rows of unequal sizes: each image in its own size, as it is made of its row alone."""

from __future__ import annotations

import pytest
import torch
from bridge_parts import requests, wemmu
from torch import Tensor
from torch.testing import assert_close
from uae_parts import batch, first_stage, second_stage, third_stage

from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.batch import Batch
from umm_zoo.metrics import PSNR
from umm_zoo.outputs import Sampling
from umm_zoo.pretraining.autoencoder import Autoencoder

SIZES = [(8, 8), (4, 8), (8, 8)]


def unequal(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in SIZES]


def described() -> Batch:
    rows = batch(3)
    return Batch(rows.keys, rows.conversations, unequal(), [1] * 3)


def sizes_of(images: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(image.shape[1:]) for image in images]


def test_a_bridge_generates_each_row_in_the_size_of_its_target() -> None:
    method, rows = wemmu(), requests(0, 1, 2)
    rows.targets = list(unequal())
    outputs = method.validation_step(rows, 0)
    assert sizes_of(outputs.generated) == sizes_of(outputs.round_trips) == SIZES
    for row in range(3):
        assert_close(outputs.generated[row], method.validation_step(rows.select([row]), 0).generated[0], atol=1e-4, rtol=1e-4)
    metric = PSNR()
    metric.update(outputs, rows)
    assert metric.compute().isfinite()


def test_a_bridge_makes_images_again_each_in_its_own_size_and_from_its_own_seed() -> None:
    method, images = wemmu(), unequal()
    made = method.reconstruct(images, seed=5)
    assert sizes_of(made) == sizes_of(method.round_trip(images)) == SIZES
    assert_close(made[2], method.reconstruct(images[2:], seed=7)[0], atol=1e-4, rtol=1e-4)


def test_a_codec_is_scored_on_each_image_in_its_own_size() -> None:
    method = Autoencoder(KLCodec.from_config(wemmu().codec.model.config)).eval()
    rows = Batch(["a", "b", "c"], [[]] * 3, unequal(), [1] * 3)
    outputs = method.validation_step(rows, 0)
    losses = [method.validation_step(rows.select([row]), 0).scalars["loss"] for row in range(3)]
    assert sizes_of(outputs.generated) == SIZES
    assert_close(outputs.scalars["loss"], torch.stack(losses).mean())


@torch.no_grad()
@pytest.mark.parametrize("make", [first_stage, second_stage, third_stage])
def test_uae_makes_each_image_again_in_its_own_size(make) -> None:
    method = make().eval()
    outputs = method.validation_step(described(), 0)
    assert sizes_of(outputs.generated) == sizes_of(outputs.from_true_captions) == sizes_of(outputs.columns["original"]) == SIZES
    alone = method.made_again(["red", "red", "blue"], [3, 4, 5], unequal())
    assert sizes_of(alone) == SIZES
    assert_close(alone[1], method.images_of_captions(["red"], [4], None, Sampling(size=(4, 8)))[0], atol=1e-4, rtol=1e-4)
    captions, made = method.reconstruct_from_captions(unequal(), [1, 2, 3])
    assert len(captions) == 3 and sizes_of(made) == [(8, 8)] * 3  # a caption says nothing of a size


@torch.no_grad()
def test_what_codec_or_decoder_cannot_make_is_made_in_the_renderers_own_size() -> None:
    method = first_stage().eval()
    images = [torch.zeros(3, 7, 8), torch.zeros(3, 8, 32)]  # no multiple of the codec's 2; more cells than the decoder has places
    assert sizes_of(method.reconstruct(images)) == [(8, 8)] * 2


@pytest.mark.parametrize("make", [second_stage, third_stage])
def test_a_rollout_has_images_of_the_sizes_of_its_rows_and_a_gradient(make) -> None:
    method = make()
    torch.manual_seed(0)
    losses = method.training_losses(described())
    losses["loss"].backward()
    group = method.rollouts.group
    assert sizes_of(method.rollout.generated) == [size for size in SIZES for _ in range(group)]
    assert losses["loss"].isfinite() and method.rollout.rewards.shape == (3, group)


def test_steps_of_images_of_two_sizes_are_scored_as_those_of_each_alone() -> None:
    method = third_stage()
    torch.manual_seed(0)
    rollout = method.roll_out(described())
    rollout.advantages = torch.randn(len(rollout.generated))
    together = sum(part()["loss"] for part in method.loss_parts(rollout))
    assert [path.samples.shape[-2:] for path in rollout.paths] == [(4, 4), (2, 4)]
    shares = [
        (path, numbers, len(numbers) / len(rollout.generated)) for path, numbers in zip(rollout.paths, rollout.numbers, strict=True)
    ]
    alone = torch.zeros(())
    for path, numbers, share in shares:
        for step in method.objective.trained_steps:
            velocity = method._velocity(rollout.negative, numbers)
            condition = rollout.condition.select(numbers.tolist())
            found = method.objective.step_loss(velocity, path, step, condition, rollout.advantages[numbers], None)
            alone = alone + share * found["loss"] / len(method.objective.trained_steps)
    assert_close(together, alone)
