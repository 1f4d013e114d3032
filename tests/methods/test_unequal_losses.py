"""Losses of a batch of images of unequal sizes: the means over its images, each as alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_configs
import torch
from test_unequal_bridge import StillFlow
from tiny_configs import DC, SANA, T5, TEXT, VISION
from torch import Tensor
from torch.testing import assert_close
from uae_parts import first_stage, renderer

from tests.backbones.vlm_parts import qwen
from umm_zoo.backbones.codecs import DCCodec, KLCodec
from umm_zoo.backbones.features import CLIPFeatures, CLIPVisionFeatures, DINOv2Features
from umm_zoo.backbones.sana import Sana
from umm_zoo.backbones.text_encoder import TextEncoder
from umm_zoo.batch import Batch
from umm_zoo.blocks.denoisers import MLPRegressionHead
from umm_zoo.blocks.targets import CodecLatents, PixelPatches
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.methods.ross import ROSS
from umm_zoo.objectives.contrast import SoftmaxContrast
from umm_zoo.objectives.regression import MeanSquaredError
from umm_zoo.pretraining.autoencoder import Autoencoder
from umm_zoo.pretraining.contrastive import Contrastive
from umm_zoo.pretraining.self_supervised import MaskedImageModelling
from umm_zoo.pretraining.text_to_image import TextToImage


def noise(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in sizes]


def batch(*sizes: tuple[int, int], targets: bool = False, answer: str = "a red circle") -> Batch:
    """One image per row."""
    user = {"role": "user", "text": "Draw it." if targets else "<image>"}
    rows: Any = [[user, {"role": "assistant", "text": f"{answer} {place}"}] for place in range(len(sizes))]
    keys, images = [f"row {place}" for place in range(len(sizes))], noise(*sizes)
    return Batch(keys, rows, targets=images) if targets else Batch(keys, rows, images, [1] * len(sizes))  # type: ignore[arg-type]


def autoencoder(kind: str = "dc") -> Autoencoder:
    torch.manual_seed(0)
    codec = KLCodec.from_config(tiny_configs.codec(2)) if kind == "kl" else DCCodec.from_config(DC)
    perceptual = CLIPVisionFeatures.from_config(VISION)
    made = Autoencoder(codec, perceptual, mse_weight=0.5, perceptual_weight=0.3)
    made.train_only(["codec"])
    return made


def text_to_image() -> TextToImage:
    torch.manual_seed(0)
    codec = KLCodec.from_config(tiny_configs.codec(5, (4, 8), use_quant_conv=False, use_post_quant_conv=False))
    made = TextToImage(TextEncoder.from_config(T5), Sana.from_config(SANA), codec, StillFlow(num_steps=2), drop_text=0.0)
    made.train_only(["text_encoder", "decoder"])
    return made


def captions_to_images() -> Method:
    own = renderer()
    own.objective = StillFlow(num_steps=2)
    return first_stage(renderer=own, drop_caption=0.0)


def ross() -> ROSS:
    torch.manual_seed(0)
    made = ROSS(qwen(), PixelPatches(4, 4), MLPRegressionHead(32, 48), MeanSquaredError())
    made.train_only(["projector", "language_model", "head"])
    return made


SIZES = ((8, 8), (8, 16), (16, 8), (8, 16), (8, 8))
METHODS: dict[str, tuple[Callable[[], Method], Batch, str]] = {
    "autoencoder": (autoencoder, batch(*SIZES), "loss"),
    "autoencoder of targets": (autoencoder, batch(*SIZES, targets=True), "loss"),
    "text-to-image": (text_to_image, batch(*SIZES, targets=True), "loss"),
    "UAE": (captions_to_images, batch((8, 8), (4, 8), (8, 4), (4, 8)), "loss"),
    # 4 x 4 tokens of 8 px each, whatever the size was before the tower's own rounding
    "ROSS": (ross, batch((32, 32), (30, 34), (34, 30), (30, 34)), "reconstruction_loss"),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_the_mean_over_images_alone_and_so_is_its_gradient(name: str) -> None:
    make, rows, term = METHODS[name]
    method, count = make(), len(rows)
    losses = method.training_losses(rows)
    losses[term].backward()
    found = {key: value.grad.clone() for key, value in method.named_parameters() if value.grad is not None}
    method.zero_grad(set_to_none=True)
    alone: list[dict[str, Tensor]] = []
    for row in range(count):
        alone.append(method.training_losses(rows.select([row])))
        (alone[-1][term] / count).backward()
    for key in losses if term == "loss" else [term]:
        assert_close(losses[key], torch.stack([own[key] for own in alone]).mean(), rtol=1e-5, atol=1e-6)
    assert len({round(float(own[term].detach()), 6) for own in alone}) == count and found
    for key, value in method.named_parameters():
        if value.grad is not None:
            assert_close(found[key], value.grad, rtol=1e-3, atol=1e-5)


def test_a_codec_s_statistics_are_those_of_all_latents() -> None:
    method, rows = autoencoder("kl"), batch(*SIZES)
    method.statistics_momentum = 0.0
    latents = torch.cat([method.codec.posterior(image[None])[0].flatten() for image in rows.images])
    method.training_losses(rows)
    assert_close(method.codec.shift, latents.mean().detach(), rtol=1e-4, atol=1e-5)
    assert_close(method.codec.scaling, 1 / latents.std(unbiased=False).detach(), rtol=1e-4, atol=1e-5)


def test_ross_refuses_an_image_of_as_many_tokens_in_another_grid() -> None:
    method = ross()
    with pytest.raises(UserError, match=r"found an image of 16 x 64 px, which is 2 x 8 tokens, expected 4 x 4 tokens"):
        method.training_losses(batch((32, 32), (16, 64)))
    with pytest.raises(UserError, match=r"16 x 64 px"):
        method.reconstruct(torch.zeros(1, 3, 16, 64))


def test_stored_targets_of_ross_are_those_of_each_image_alone() -> None:
    method = ROSS(qwen(), CodecLatents(KLCodec.from_config(tiny_configs.codec(2)), 4), MLPRegressionHead(32, 8), MeanSquaredError())
    [item], rows = method.precomputable().values(), batch((32, 32), (30, 34), (24, 40))
    alone = torch.cat([item.compute(rows.select([row])) for row in range(3)])
    assert_close(item.compute(rows), alone, rtol=0, atol=1e-5)


def test_features_of_contrast_are_those_of_each_image_alone() -> None:
    torch.manual_seed(0)
    encoder = CLIPFeatures.from_config({"vision_config": VISION, "text_config": TEXT, "projection_dim": 8})
    method, rows = Contrastive(encoder, SoftmaxContrast(), None).eval(), batch((8, 8), (12, 20), (8, 8), (20, 12))
    with torch.no_grad():
        found = method.validation_step(rows, 0).image_features
        alone = torch.cat([encoder(image[None]) for image in rows.images])
    assert_close(found, torch.nn.functional.normalize(alone, dim=-1), rtol=0, atol=1e-5)
    method.training_losses(rows)["loss"].backward()


def test_masked_images_may_have_any_sizes() -> None:
    sizes = {name: size for name, size in VISION.items() if name != "intermediate_size"}
    method = MaskedImageModelling(DINOv2Features.from_config({**sizes, "mlp_ratio": 2}))
    losses = method.training_losses(batch((8, 8), (12, 20), (20, 12)))
    assert losses["loss"].isfinite()
