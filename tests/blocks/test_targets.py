"""Reconstruction targets: order of pixels and latents, sizes, what is frozen, what can be looked at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.features import CLIPVisionFeatures, DINOv2Features
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.batch import Tokens
from umm_zoo.blocks.denoisers import MLPRegressionHead
from umm_zoo.blocks.targets import (
    CodecLatents,
    OtherImages,
    PixelPatches,
    PixelsThroughCodec,
    TeacherFeatures,
    patchify,
)
from umm_zoo.objectives.regression import MeanSquaredError


class AveragingCodec(LatentCodec):
    """Latent = mean colour of every f x f window times 3; its posterior has variance 4."""

    def __init__(self, downsampling: int = 2, scaling: float = 0.3611, shift: float = 0.1159) -> None:
        super().__init__(3, downsampling, scaling, shift)
        self.gain = nn.Parameter(torch.tensor(3.0))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = nn.functional.avg_pool2d(images, self.downsampling) * self.gain
        return mean, torch.full_like(mean, 4.0).log()

    def expand(self, latents: Tensor) -> Tensor:
        return (latents / self.gain).repeat_interleave(self.downsampling, 2).repeat_interleave(self.downsampling, 3)


def test_packing_order():
    packed = patchify(torch.arange(32.0).reshape(1, 2, 4, 4), 2)[0]  # [4 tokens, 8 channels]
    assert packed[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert packed[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert packed[2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]
    assert packed[3].tolist() == [10, 11, 14, 15, 26, 27, 30, 31]


def test_resizing_and_clamping():
    target = PixelPatches(grid=5, patch=1)
    row = torch.tensor([0.0, 1, 2, 3]) / 4
    found = target.prepare(row.expand(1, 3, 4, 4))
    assert_close(found[0, 0, 0], torch.tensor([0, 0.7, 1.5, 2.3, 3.0]) / 4)
    assert target.prepare(torch.full((1, 3, 4, 4), 3.0)).max() == 1
    assert target.prepare(torch.full((1, 3, 5, 5), -3.0)).min() == -1


@pytest.mark.parametrize(("grid", "size"), [(24, 384), (27, 432)])
def test_image_size_of_the_paper(grid, size):
    assert CodecLatents(AveragingCodec(downsampling=8), grid).image_size == size
    assert PixelPatches(grid).image_size == size and PixelPatches(grid).channels == 768


def test_latents_are_scaled_packed_and_of_the_mean_when_asked():
    codec = AveragingCodec()
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    target = CodecLatents(codec, grid=3, sampled=False)
    tokens = target(images)
    assert tokens.shape == (2, 9, 12) and target.channels == 12
    window = images[1, :, 4:6, 10:12].mean((1, 2)) * 3  # latent cell (2, 5): token 1 * 3 + 2, row 0 and column 1 inside
    assert_close(tokens[1, 5, [1, 5, 9]], (window - 0.1159) * 0.3611)


def test_scaling_of_known_latents():
    codec = AveragingCodec()
    found = codec.normalise(torch.tensor([0.0, 1.0]))
    assert_close(found, torch.tensor([-0.04185149, 0.31924851]))


def test_posterior_is_drawn_anew_with_its_own_spread():
    target = CodecLatents(AveragingCodec(), grid=3)
    images, generator = torch.zeros(200, 3, 12, 12), torch.Generator().manual_seed(0)
    first, second = target(images, generator), target(images, generator)
    assert not torch.equal(first, second)
    assert float(first.std()) == pytest.approx(2 * 0.3611, rel=0.02)
    assert torch.equal(first, target(images, torch.Generator().manual_seed(0)))


def test_images_of_exact_predictions_are_the_codecs_round_trip():
    codec = AveragingCodec()
    target, images = CodecLatents(codec, grid=3, sampled=False), torch.rand(2, 3, 12, 12)
    assert_close(target.images(on_grid(target(images))), codec.decode(codec.encode(images)))


def test_round_trip_of_the_codec_is_without_noise():
    codec, images = AveragingCodec(), torch.rand(2, 3, 12, 12)
    expected = codec.decode(codec.encode(images)).clamp(-1, 1)
    for target in (CodecLatents(codec, grid=3), PixelsThroughCodec(codec, grid=3)):
        assert torch.equal(target.round_trip(images), expected)
    assert torch.equal(PixelPatches(grid=3, patch=4).round_trip(images), images)


def on_grid(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (3, 3))


def test_pixels_come_back():
    target, images = PixelPatches(grid=3, patch=4), torch.rand(2, 3, 12, 12)
    assert torch.equal(target.images(on_grid(target(images))), images)


def test_gradient_passes_the_frozen_decoder_to_the_head():
    codec = AveragingCodec()
    target, head = freeze(PixelsThroughCodec(codec, grid=3)), MLPRegressionHead(8, 12)
    images, states = torch.rand(2, 3, 12, 12), torch.randn(2, 9, 8, requires_grad=True)
    losses = MeanSquaredError().losses(target.predictor(head), on_grid(target(images)), Tokens(states))
    losses.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters()) and states.grad.any()
    assert all(p.grad is None for p in target.parameters())


def test_pixels_through_the_codec_are_images():
    target = PixelsThroughCodec(AveragingCodec(), grid=3)
    latents = torch.randn(2, 12, 3, 3) * 0.1
    predicted = target.predictor(lambda condition: latents)(Tokens(torch.zeros(2, 9, 8)))
    assert predicted.shape == (2, 48, 3, 3)
    decoded = target.codec.decode(nn.functional.pixel_shuffle(latents, 2)).clamp(-1, 1)
    assert torch.equal(target.images(predicted), decoded)


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}


@pytest.mark.parametrize(
    "teacher",
    [
        DINOv2Features.from_config({**TINY, "patch_size": 8}, image_size=32),
        CLIPVisionFeatures.from_config({**TINY, "patch_size": 8, "intermediate_size": 32}),
    ],
)
def test_teachers_are_normalised_and_resized(teacher):
    images = torch.rand(2, 3, 24, 24)
    same, larger = TeacherFeatures(teacher, grid=4), TeacherFeatures(teacher, grid=6)
    assert same.image_size == 32 and same.channels == 16
    features = teacher.tokens(same.prepare(images))
    assert_close(same(images), nn.functional.layer_norm(features, (16,), eps=1e-6))
    assert larger(images).shape == (2, 36, 16)
    assert_close(larger(images).std(-1, correction=0), torch.ones(2, 36), rtol=0, atol=1e-3)


def test_other_images_are_those_before_and_nothing_else_changes():
    images, own = torch.rand(3, 3, 12, 12), PixelPatches(3, 4)
    target = OtherImages(own)
    assert torch.equal(target(images), own(images[[2, 0, 1]]))
    assert torch.equal(target.of_stored(own(images)), own(images[[2, 0, 1]]))
    assert torch.equal(target.round_trip(images), own.round_trip(images))
    assert (target.grid, target.channels, target.image_size) == (3, 48, 12)


def test_targets_carry_no_gradient():
    images = torch.rand(1, 3, 12, 12, requires_grad=True)
    for target in (PixelPatches(3, 4), CodecLatents(AveragingCodec(), 3), PixelsThroughCodec(AveragingCodec(), 3)):
        assert not target(images).requires_grad


def test_stored_targets():
    target = CodecLatents(AveragingCodec(), grid=3)
    latents = torch.randn(2, 3, 6, 6)
    assert torch.equal(target.of_stored(latents), patchify(latents, 2))
    assert torch.equal(target.of_stored(patchify(latents, 2)), patchify(latents, 2))
    with pytest.raises(ValueError, match=r"found stored targets \[2, 4, 12\], expected \[M, 9, F\]"):
        target.of_stored(torch.zeros(2, 4, 12))


def test_flux_like_codec_has_sixteen_channels():
    config = {"latent_channels": 16, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    target = CodecLatents(KLCodec.from_config(config | blocks | plain), grid=3)
    assert target(torch.rand(1, 3, 10, 10)).shape == (1, 9, 64)
