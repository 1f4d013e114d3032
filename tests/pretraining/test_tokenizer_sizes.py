"""Tokenizers of images of other sizes than their encoder was trained on: its own grid for each, positions stretched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_configs import TEXT, clip
from torch import Tensor
from torch.testing import assert_close
from transformers.models.clip import CLIPVisionModel

from umm_zoo.backbones.diffusion_codec import ConvEncoder, DiffusionCodec, UNetPixelDenoiser
from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.features import CLIPFeatures, CLIPVisionFeatures, DINOv2Features, DINOv3Features, SigLIPVisionFeatures
from umm_zoo.backbones.visual_tokenizer import Branch, VisualTokenizer
from umm_zoo.batch import Batch, Grid
from umm_zoo.blocks.bottlenecks import Bottleneck, LinearProjection
from umm_zoo.blocks.pixel_decoders import ConvPixelDecoder, ViTPixelDecoder
from umm_zoo.blocks.positions import CroppedTable2d, SineCosine2d, stretched
from umm_zoo.blocks.quantizers import BinaryQuantizer, EMAQuantizer
from umm_zoo.errors import UserError
from umm_zoo.objectives.contrast import SoftmaxContrast
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.pretraining.dualtoken import DualToken
from umm_zoo.pretraining.epsilon_vae import EpsilonVAE
from umm_zoo.pretraining.qlip import QLIP
from umm_zoo.pretraining.tokenizer import Tokenizer

SIZES = {key: value for key, value in clip().items() if key not in ("model_type", "intermediate_size")}
ENCODERS: dict[str, Any] = {
    "clip": lambda: CLIPVisionFeatures.from_config(SIZES),
    "siglip": lambda: SigLIPVisionFeatures.from_config({**SIZES, "intermediate_size": 20}),
    "dinov2": lambda: DINOv2Features.from_config(SIZES),
    "dinov3": lambda: DINOv3Features.from_config({**SIZES, "intermediate_size": 20, "num_register_tokens": 2}),
}
#: Rows of two sizes, one after the other.
MIXED = [(8, 12), (8, 8), (8, 12), (16, 4), (8, 8)]


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in sizes]


def batch(*sizes: tuple[int, int]) -> Batch:
    turns = [[{"role": "user", "text": "<image>"}, {"role": "assistant", "text": f"image {i}"}] for i in range(len(sizes))]
    return Batch([f"row{i}" for i in range(len(sizes))], turns, images(*sizes), [1] * len(sizes))  # type: ignore[arg-type]


def branch(quantizer: Any = None, layer: int = -1) -> Branch:
    own = quantizer or BinaryQuantizer(6)
    return Branch(Bottleneck(LinearProjection(16, own.dim), own, LinearProjection(own.dim, 16)), layer)


def tokenizer(encoder: FeatureEncoder | None = None, **more: Branch) -> VisualTokenizer:
    torch.manual_seed(0)
    own = encoder or CLIPVisionFeatures.from_config(SIZES)
    return VisualTokenizer(own, {"pixel": branch(), **more}, ViTPixelDecoder(16, 4, 16, 1, 2))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_size_has_its_own_grid(name: str) -> None:
    codec = tokenizer(ENCODERS[name]()).eval()
    for image in images((8, 12), (16, 4), (8, 8), (20, 12)):
        grid = Grid(image.shape[1] // 4, image.shape[2] // 4)
        codes = codec.codes(image[None])
        assert codes.shape == (1, grid.num_cells, 1) and codec.token_grid(*image.shape[1:]) == grid
        assert codec.encode(image[None]).shape == (1, 6, *grid)
        assert_close(codec.images(codes, grid), codec.decode(codec.encode(image[None])).clamp(-1, 1))


def test_tokens_are_the_library_s_with_interpolated_positions() -> None:
    encoder = CLIPVisionFeatures.from_config(SIZES).eval()
    model: CLIPVisionModel = encoder.model
    image = images((8, 12))[0][None]
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    pixels = (image / 2 + 0.5 - mean) / std
    expected = model(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    vector, (last, shallow) = encoder.as_they_are(image, [-1, -2])
    assert_close(last, expected.last_hidden_state[:, 1:])
    assert_close(shallow, expected.hidden_states[-2][:, 1:])
    assert_close(vector, expected.pooler_output)


def test_the_size_of_training_is_seen_as_before() -> None:
    encoder = CLIPVisionFeatures.from_config(SIZES).eval()
    own = torch.stack(images((8, 8), (8, 8)))
    vector, (tokens,) = encoder.as_they_are(own, [-2])
    assert torch.equal(vector, encoder(own)) and torch.equal(tokens, encoder.tokens(own, -2))


@pytest.mark.parametrize("positions", [SineCosine2d(8), CroppedTable2d(8, 3, 3, init_std=1.0)])
def test_marks_of_a_larger_grid_are_those_of_the_trained_one_stretched(positions: Any) -> None:
    tokens = torch.randn(2, 24, 8)
    found = stretched(positions, tokens, Grid(4, 6), Grid(3, 3)) - tokens
    marks = positions(torch.zeros(1, 9, 8), Grid(3, 3)).view(3, 3, 8).permute(2, 0, 1)[None]
    expected = F.interpolate(marks, size=(4, 6), mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)
    assert_close(found, expected.expand(2, -1, -1))
    assert torch.equal(stretched(positions, tokens[:, :9], Grid(3, 3), Grid(3, 3)), positions(tokens[:, :9], Grid(3, 3)))


def test_a_batch_of_unequal_images_is_the_mean_over_its_rows() -> None:
    method = Tokenizer(tokenizer()).train()
    method.quantizer_weight = 0.0  # entropies are of a group, not of a row
    whole, mixed = method.training_losses(batch(*MIXED)), batch(*MIXED)
    alone = [float(method.training_losses(mixed.select([row]))["loss"].detach()) for row in range(5)]
    assert_close(float(whole["loss"].detach()), sum(alone) / 5, rtol=1e-5, atol=1e-6)


def test_texts_are_compared_with_all_images_whatever_their_size() -> None:
    encoder = CLIPFeatures.from_config({"vision_config": SIZES, "text_config": TEXT, "projection_dim": 8})
    method = QLIP(tokenizer(encoder), SoftmaxContrast(), commitment_weight=0.0).train()
    mixed = batch(*MIXED)
    found = method.training_losses(mixed)["align"]
    vectors = torch.cat([encoder.as_they_are(image[None], [-1])[0] for image in mixed.images])
    assert_close(found, method._compared(vectors, mixed).scalars["loss"])
    assert_close(method.training_losses(mixed.select([4, 1, 0, 3, 2]))["align"], found)


def test_a_teacher_sees_the_same_grid() -> None:
    torch.manual_seed(0)
    encoder = CLIPVisionFeatures.from_config(SIZES)
    teacher = CLIPVisionFeatures.from_config(SIZES)
    branches = {"pixel": branch(EMAQuantizer(4, 9), -2), "semantic": branch(EMAQuantizer(4, 9))}
    codec = VisualTokenizer(encoder, branches, ConvPixelDecoder(16, [8, 8, 8], blocks=1))
    losses = DualToken(codec, teacher).train().training_losses(batch(*MIXED))
    assert all(value.isfinite() for value in losses.values()) and "semantic" in losses


def test_validation_keeps_the_order_of_unequal_rows() -> None:
    outputs = Tokenizer(tokenizer()).eval().validation_step(mixed := batch(*MIXED), 0)
    assert outputs.generated is not None and outputs.references is not None and outputs.codes is not None
    for made, seen, codes, image in zip(outputs.generated, outputs.references, outputs.codes, mixed.images, strict=True):
        assert made.shape == image.shape and torch.equal(seen, image) and len(codes) == image.shape[1] * image.shape[2] // 16


def test_what_an_encoder_does_not_take_is_one_line() -> None:
    codec = tokenizer()
    with pytest.raises(UserError, match="8 x 10 px, expected 8 x 8 px, the size of the encoder, or multiples of 4 px") as refused:
        codec.codes(torch.zeros(1, 3, 8, 10))
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(UserError, match="8 x 12 px, expected 8 x 8 px, the one size of the encoder"):
        FeatureEncoder.grid_of(codec.encoder, 8, 12)


def test_a_drawing_decoder_trains_on_unequal_images_and_sees_all_their_latents() -> None:
    torch.manual_seed(0)
    codec = DiffusionCodec(ConvEncoder(2, [8, 8], 1, 4), UNetPixelDenoiser(2, [8, 8], 1, 4), FlowMatching(num_steps=2))
    method = EpsilonVAE(codec, statistics_momentum=0.0).train()
    method.training_losses(mixed := batch(*MIXED))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters() if p.requires_grad)
    latents = torch.cat([codec.posterior(image[None])[0].flatten() for image in mixed.images])
    assert_close(codec.shift, latents.mean().detach(), atol=1e-5, rtol=1e-5)
    assert_close(codec.scaling, 1 / latents.std(correction=0).detach(), atol=1e-4, rtol=1e-4)
