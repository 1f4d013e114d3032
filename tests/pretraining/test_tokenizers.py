"""Visual tokenizers: codes and images belong together, terms are the papers' own, and other methods take them as codecs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learning import losses_of
from tiny_configs import TEXT, VISION
from torch import Tensor
from torch.testing import assert_close

from tests.backbones import janus_parts
from umm_zoo.backbones.diffusion_codec import ConvEncoder, DiffusionCodec, UNetPixelDenoiser
from umm_zoo.backbones.features import CLIPFeatures, DINOv2Features, SigLIPVisionFeatures
from umm_zoo.backbones.rest_of_tower import vector_of
from umm_zoo.backbones.visual_tokenizer import Branch, VisualTokenizer
from umm_zoo.batch import Batch
from umm_zoo.blocks.bottlenecks import AttentionProjection, Bottleneck, IdentityProjection, LinearProjection, MLPProjection
from umm_zoo.blocks.discriminators import PatchDiscriminator, TimeDiscriminator
from umm_zoo.blocks.pixel_decoders import ConvPixelDecoder, ViTPixelDecoder
from umm_zoo.blocks.quantizers import (
    BinaryQuantizer,
    EMAQuantizer,
    NoQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQuantizer,
    VectorQuantizer,
)
from umm_zoo.blocks.targets import CodecLatents
from umm_zoo.errors import UserError
from umm_zoo.objectives.adversarial import AdversarialLoss
from umm_zoo.objectives.contrast import SoftmaxContrast
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.schedules import ReversedLog
from umm_zoo.objectives.solvers import Euler
from umm_zoo.pretraining.dualtoken import DualToken
from umm_zoo.pretraining.epsilon_vae import EpsilonVAE
from umm_zoo.pretraining.judged import Judges
from umm_zoo.pretraining.qlip import QLIP
from umm_zoo.pretraining.tokenizer import Tokenizer
from umm_zoo.pretraining.vqrae import VQRAE
from umm_zoo.testing import check_block
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup

WIDTH, SIDE = VISION["hidden_size"], VISION["image_size"]


def encoder() -> CLIPFeatures:
    return CLIPFeatures.from_config({"vision_config": VISION, "text_config": TEXT, "projection_dim": 8})


def siglip() -> SigLIPVisionFeatures:
    torch.manual_seed(0)
    return SigLIPVisionFeatures.from_config({key: value for key, value in VISION.items() if key != "model_type"}).eval()


def bottleneck(quantizer: Quantizer) -> Bottleneck:
    return Bottleneck(MLPProjection(WIDTH, quantizer.dim), quantizer, MLPProjection(quantizer.dim, WIDTH))


def pixel_branch(quantizer: Quantizer, layer: int = -1) -> dict[str, Branch]:
    return {"pixel": Branch(bottleneck(quantizer), layer)}


def decoder(width: int = WIDTH, patch: int = VISION["patch_size"]) -> ViTPixelDecoder:
    return ViTPixelDecoder(width, patch, width=16, depth=1, heads=2)


def tokenizer(quantizer: Quantizer | None = None, **more: Branch) -> VisualTokenizer:
    torch.manual_seed(0)
    return VisualTokenizer(encoder(), {**pixel_branch(quantizer or BinaryQuantizer(12)), **more}, decoder())


def dual_token() -> DualToken:
    """Pixels of the first layer and semantics of the last, two codes each of one table that follows averages."""
    torch.manual_seed(0)
    books = [
        Bottleneck(MLPProjection(WIDTH, 4), ResidualQuantizer([EMAQuantizer(4, 6)], 2), MLPProjection(4, WIDTH)) for _ in range(2)
    ]
    own = encoder()
    branches = {"pixel": Branch(books[0], layer=-2), "semantic": Branch(books[1])}
    return DualToken(VisualTokenizer(own, branches, decoder()), copy.deepcopy(own))


def batch(count: int = 3, side: int = SIDE) -> Batch:
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    turns = [[{"role": "user", "text": "<image>"}, {"role": "assistant", "text": f"image {i}"}] for i in range(count)]
    return Batch([f"row{i}" for i in range(count)], turns, images, [1] * count)  # type: ignore[arg-type]


QUANTIZERS: dict[str, Quantizer] = {
    "bsq": BinaryQuantizer(28),
    "ema": EMAQuantizer(5, 40),
    "sim": SimVQuantizer(WIDTH, 40),
    "rvq": ResidualQuantizer([VectorQuantizer(5, 20, normalised=False) for _ in range(3)]),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_images_of_the_integers_are_those_of_the_latents(name: str) -> None:
    codec, images = tokenizer(copy.deepcopy(QUANTIZERS[name])).eval(), batch().images
    codes = codec.codes(torch.stack(list(images)))
    assert codes.shape == (3, codec.encoder.grid.num_cells, QUANTIZERS[name].codes_per_token)
    latents = codec.encode(torch.stack(list(images)))
    assert latents.shape == (3, QUANTIZERS[name].dim, *codec.encoder.grid)
    assert_close(codec.images(codes), codec.decode(latents).clamp(-1, 1))


def test_codes_of_all_branches_stand_beside_each_other_and_pixels_read_their_own() -> None:
    semantic = Branch(bottleneck(EMAQuantizer(5, 40)), layer=-1)
    quantizer = ResidualQuantizer([EMAQuantizer(6, 40)], repeats=2)
    codec = VisualTokenizer(
        encoder(),
        {"semantic": semantic, **pixel_branch(quantizer, layer=-2)},
        decoder(),
    ).eval()
    codes = codec.codes(torch.stack(list(batch().images)))
    assert codes.shape[-1] == 3
    moved = codes.clone()
    moved[..., 0] = (moved[..., 0] + 1) % 40  # the semantic one
    assert torch.equal(codec.images(moved), codec.images(codes)) and torch.equal(codec.images(codes[..., 1:]), codec.images(codes))
    moved[..., 2] = (moved[..., 2] + 1) % 40
    assert not torch.equal(codec.images(moved), codec.images(codes))


def test_one_pass_of_the_encoder_gives_what_two_would() -> None:
    own, images = encoder().eval(), torch.stack(list(batch().images))
    vector, (shallow, last) = own.vector_and_tokens(images, [-2, -1])
    assert_close(vector, own(images))
    assert_close(shallow, own.tokens(images, -2))
    assert_close(last, own.tokens(images))


@pytest.mark.parametrize("name", ["bsq", "sim"])
def test_a_tokenizer_learns_to_give_images_back(name: str) -> None:
    method = Tokenizer(tokenizer(copy.deepcopy(QUANTIZERS[name])))
    TrainingSetup(["encoder", "branches", "decoder"], AdamW(3e-3)).prepare(method)
    losses_of(method, batch(), 80)
    before = Tokenizer(tokenizer(copy.deepcopy(QUANTIZERS[name]))).eval().validation_step(batch(), 0).scalars["mse"]
    outputs = method.eval().validation_step(batch(), 0)
    assert outputs.scalars["mse"] < 0.6 * before
    assert set(method.makes) == {*outputs.scalars, "generated", "references", "codes", "tokens", "image_features"}
    assert_close(torch.stack(outputs.generated), torch.stack(method.round_trip(batch().images)))  # type: ignore[arg-type]


def test_tables_of_averages_move_once_per_step() -> None:
    method = Tokenizer(tokenizer(EMAQuantizer(5, 40)))
    quantizer: Any = method.codec.branch("pixel").bottleneck.quantizer
    before = quantizer.codebook.clone()
    for _ in range(2):
        method.training_losses(batch())
    assert torch.equal(quantizer.codebook, before)
    method.on_before_optimizer_step(None)  # type: ignore[arg-type]
    assert not torch.equal(quantizer.codebook, before)
    assert_close(quantizer.counts.sum(), torch.tensor(0.99 * 40 + 0.01 * 2 * 3 * method.codec.encoder.grid.num_cells))


def test_a_skipped_step_leaves_tables_of_averages_alone() -> None:
    method = Tokenizer(tokenizer(EMAQuantizer(5, 40)))
    quantizer: Any = method.codec.branch("pixel").bottleneck.quantizer
    before, rows = quantizer.codebook.clone(), batch()
    method.training_losses(replace(rows, images=[image * float("nan") for image in rows.images]))
    method.step.skipping = True
    method.on_before_optimizer_step(None)  # type: ignore[arg-type]
    assert torch.equal(quantizer.codebook, before) and not quantizer.step_counts.any()
    method.step.skipping = False
    method.training_losses(rows)
    method.on_before_optimizer_step(None)  # type: ignore[arg-type]
    assert quantizer.codebook.isfinite().all() and not torch.equal(quantizer.codebook, before)


def weigh(losses: dict[str, Tensor], **weights: float) -> Tensor:
    return torch.stack([weight * losses[name.replace("__", "/")] for name, weight in weights.items()]).sum()


def test_terms_of_qlip() -> None:
    method = QLIP(tokenizer(), SoftmaxContrast(), align_weight=3.0, commitment_weight=0.5, mse_weight=20.0, quantizer_weight=0.7)
    losses = method.training_losses(batch())
    expected = weigh(losses, mse=20.0, quantizer__loss=0.7, align=3.0, commitment=0.5)
    assert_close(losses["loss"], expected)
    images = torch.stack(list(batch().images))
    vectors = F.normalize(method.texts(images), dim=-1)
    texts = F.normalize(method.texts.encode_text(["image 0", "image 1", "image 2"]), dim=-1)
    logits = method.texts.model.logit_scale.exp() * vectors @ texts.T
    labels = torch.arange(3)
    assert_close(losses["align"], (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    outputs = method.eval().validation_step(batch(), 0)
    assert set(method.makes) == {*outputs.scalars, "generated", "references", "codes", "tokens", "image_features", "text_features"}
    assert_close(outputs.scalars["align"], losses["align"])


def test_contrast_alone_reaches_the_text_tower_and_pixels_alone_the_decoder() -> None:
    method = QLIP(tokenizer(), SoftmaxContrast(), align_weight=1.0, commitment_weight=0.0, mse_weight=0.0, quantizer_weight=0.0)
    method.training_losses(batch())["loss"].backward()
    model: Any = method.texts.model
    assert model.text_model.encoder.layers[0].mlp.fc1.weight.grad.abs().max() > 0
    assert method.codec.decoder.enter.weight.grad.abs().max() == 0  # type: ignore[union-attr, operator]


def test_one_codebook_of_dualtoken_serves_both_and_is_what_a_reader_gets() -> None:
    own = encoder()
    method = DualToken(VisualTokenizer(own, pixel_branch(EMAQuantizer(5, 40), layer=-2), decoder()), copy.deepcopy(own)).eval()
    outputs = method.validation_step(batch(), 0)
    assert set(method.makes) == {*outputs.scalars, "generated", "references", "codes", "tokens", "image_features"}
    made = method.codec.branch("pixel").bottleneck.tokens_of(torch.stack(outputs.codes))  # type: ignore[arg-type]
    assert_close(torch.stack(outputs.tokens), made)  # type: ignore[arg-type]
    wanted = method.teacher.tokens(torch.stack(list(batch().images)), -2)
    assert_close(outputs.scalars["semantic"], F.mse_loss(made, wanted) - F.cosine_similarity(made, wanted, dim=-1).mean())
    two = dual_token().eval()
    tokens = two.codec.tokenize(torch.stack(list(batch().images))).squeezed["semantic"].tokens
    assert_close(torch.stack(two.validation_step(batch(), 0).tokens), tokens)  # type: ignore[arg-type]


def test_terms_of_dualtoken() -> None:
    semantic = Branch(Bottleneck(LinearProjection(WIDTH, WIDTH), NoQuantizer(WIDTH), LinearProjection(WIDTH, WIDTH)), layer=-2)
    pixel = Bottleneck(LinearProjection(WIDTH, WIDTH), NoQuantizer(WIDTH), LinearProjection(WIDTH, WIDTH))
    own = encoder()
    codec = VisualTokenizer(own, {"pixel": Branch(pixel, layer=-2), "semantic": semantic}, decoder())
    for projection in (semantic.bottleneck.down, semantic.bottleneck.up):
        torch.nn.init.eye_(projection.linear.weight)  # type: ignore[union-attr, arg-type]
        torch.nn.init.zeros_(projection.linear.bias)  # type: ignore[union-attr, arg-type]
    method = DualToken(codec, copy.deepcopy(own), semantic_weight=2.0, mse_weight=5.0)
    losses = method.training_losses(batch())
    assert_close(losses["semantic"], torch.tensor(-1.0))  # the very features: no distance, cosine 1
    assert_close(losses["loss"], 5.0 * losses["mse"] - 2.0)
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_a_vector_of_a_layer_s_own_tokens_is_the_encoder_s(layer: int) -> None:
    """So that what differs in DualToken's pooled term is the quantizer alone."""
    own, images = siglip(), torch.stack(list(batch().images))
    vector, (tokens,) = own.vector_and_tokens(images, [layer])
    assert_close(vector_of(own, tokens, layer), vector)
    assert not torch.allclose(vector_of(own, tokens.flip(0), layer), vector)


def test_pooled_term_of_dualtoken() -> None:
    torch.manual_seed(0)
    own = siglip()
    branches = {"semantic": Branch(bottleneck(EMAQuantizer(5, 40)), layer=-2), **pixel_branch(EMAQuantizer(5, 40), layer=-3)}
    method = DualToken(VisualTokenizer(own, branches, decoder()), copy.deepcopy(own), pooled_weight=3.0).train()
    losses, images = method.training_losses(batch()), torch.stack(list(batch().images))
    tokens = method.codec.tokenize(images).squeezed["semantic"].tokens
    tower = own.model.vision_model if hasattr(own.model, "vision_model") else own.model
    made = tower.head(tower.post_layernorm(tower.encoder.layers[-1](tokens, None)))
    wanted = method.teacher(images)
    assert_close(losses["pooled"], F.mse_loss(made, wanted) - F.cosine_similarity(made, wanted, dim=-1).mean())
    without = DualToken(method.codec, copy.deepcopy(own)).train().training_losses(batch())
    assert_close(losses["loss"], without["loss"] + 3 * losses["pooled"])
    with pytest.raises(ValueError, match=r"DualToken\.pooled_weight: found a CLIPFeatures, expected SigLIP's"):
        DualToken(VisualTokenizer(encoder(), branches, decoder()), encoder(), pooled_weight=1.0)


def test_terms_of_vqrae() -> None:
    codec = tokenizer(SimVQuantizer(WIDTH, 40))
    method = VQRAE(codec, copy.deepcopy(codec.encoder), distill_weight=4.0)
    losses = method.training_losses(batch())
    assert_close(losses["distill"], torch.zeros(()))
    assert_close(losses["loss"], weigh(losses, mse=1.0, quantizer__codebook=1.0, quantizer__commitment=0.25))
    with torch.no_grad():
        codec.encoder.model.vision_model.embeddings.patch_embedding.weight.mul_(2)  # type: ignore[union-attr, operator]
    losses = method.training_losses(batch())
    assert losses["distill"] > 0
    assert_close(losses["loss"], weigh(losses, mse=1.0, quantizer__loss=1.0, distill=4.0))


def test_another_size_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=f"{SIDE + 1} x {SIDE + 1} px, expected {SIDE} x {SIDE} px"):
        Tokenizer(tokenizer()).training_losses(batch(side=SIDE + 1))
    other = torch.zeros(1, 3, SIDE + 1, SIDE + 1)
    with pytest.raises(UserError, match=f"expected {SIDE} x {SIDE} px"):  # so --check says it too
        Tokenizer(tokenizer()).try_images(torch.zeros(1, 3, SIDE, SIDE), other)


def test_targets_of_ross_take_a_tokenizer_as_a_codec() -> None:
    codec = tokenizer().eval()
    target = CodecLatents(codec, grid=codec.encoder.grid.h, pack=1, sampled=False)
    found = target.compute(torch.stack(list(batch().images)), None)
    assert found.shape == (3, codec.encoder.grid.num_cells, codec.latent_channels)
    assert_close(found, codec.tokenize(torch.stack(list(batch().images))).squeezed["pixel"].quantized.embeddings)


def test_janus_takes_a_tokenizer_as_its_codec() -> None:
    codec = tokenizer(BinaryQuantizer(4)).eval()
    config = {**janus_parts.JANUS, "vq_config": {"embed_dim": 6}}
    model = janus_parts.janus(config, codec=codec)
    images = torch.stack(list(batch().images))
    tokens = model.codec.codes(images)
    assert tokens.shape == (3, model.generated_grid.num_cells, 1) and model.codec.num_codes == 16
    assert model.codec.images(tokens).shape == images.shape


@pytest.mark.parametrize(
    "block",
    [
        IdentityProjection(3),
        LinearProjection(8, 3),
        MLPProjection(8, 3),
        AttentionProjection(12, 4),
        AttentionProjection(4, 12, causal=True),
        ViTPixelDecoder(5, 2, width=8, depth=2, heads=2, tanh_head=True),
        ConvPixelDecoder(5, [16, 8, 8], blocks=1),
    ],
    ids=lambda block: type(block).__name__,
)
def test_contract_of_blocks(block: torch.nn.Module) -> None:
    check_block(block)


def test_a_causal_projection_does_not_look_ahead() -> None:
    projection, tokens = AttentionProjection(4, 8, causal=True).eval(), torch.randn(1, 5, 4)
    changed = tokens.clone()
    changed[:, 3:] += 1
    assert torch.equal(projection(tokens)[:, :3], projection(changed)[:, :3])
    assert not torch.equal(projection(tokens)[:, 3:], projection(changed)[:, 3:])


def test_attention_down_is_the_mean_of_narrow_heads() -> None:
    torch.manual_seed(0)
    projection, tokens = AttentionProjection(6, 2).double(), torch.randn(1, 4, 6, dtype=torch.float64)
    for parameter in projection.out.parameters():
        torch.nn.init.zeros_(parameter)  # no feed-forward
    normed = projection.norm(tokens)
    q, k, v = projection.qkv(normed)[0].chunk(3, dim=-1)
    heads = [((q[:, s] @ k[:, s].T) / 2**0.5).softmax(dim=-1) @ v[:, s] for s in (slice(0, 2), slice(2, 4), slice(4, 6))]
    assert_close(projection(tokens)[0], projection.direct(normed)[0] + sum(heads) / 3)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: VisualTokenizer(encoder(), {}, decoder()), "branches"),
        (lambda: VisualTokenizer(encoder(), pixel_branch(NoQuantizer(3)), decoder(patch=2)), "px in all"),
        (lambda: VisualTokenizer(encoder(), pixel_branch(NoQuantizer(3)), decoder(width=5)), "of width 5"),
        (lambda: Bottleneck(LinearProjection(4, 3), NoQuantizer(2), LinearProjection(3, 4)), "a quantizer of 2"),
        (lambda: AttentionProjection(5, 3), "widths 5 and 3"),
        (lambda: DualToken(tokenizer(detail=Branch(bottleneck(BinaryQuantizer(12)))), encoder()), "branches"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Any, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        make()


def test_qlip_needs_a_text_tower() -> None:
    config = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4}
    plain = VisualTokenizer(DINOv2Features.from_config(config), pixel_branch(BinaryQuantizer(4)), decoder())
    with pytest.raises(ValueError, match="text tower"):
        QLIP(plain, SoftmaxContrast())


def test_a_discriminator_learns_beside_a_tokenizer() -> None:
    judges = Judges(encoder(), 0.3, PatchDiscriminator(8, 1), AdversarialLoss(weight=0.5))
    method = Tokenizer(tokenizer(), quantizer_weight=2.0, judges=judges)
    method.train_only(["encoder", "branches", "decoder", "discriminator"])
    losses = method.training_losses(batch())
    expected = weigh(losses, mse=1.0, quantizer__loss=2.0, perceptual=0.3, generator=0.5, discriminator=1.0)
    assert_close(losses["loss"], expected)
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in judges.discriminator.parameters())  # type: ignore[union-attr]
    assert "perceptual" in method.makes and "generator" not in method.eval().validation_step(batch(), 0).scalars


def epsilon(judges: Judges | None = None) -> EpsilonVAE:
    torch.manual_seed(0)
    flow = FlowMatching(num_steps=3, schedule=ReversedLog(), solver=Euler())
    return EpsilonVAE(DiffusionCodec(ConvEncoder(3, [8, 8], 1, groups=4), UNetPixelDenoiser(3, [8, 8], 1, groups=4), flow), judges)


def test_terms_of_epsilon_vae() -> None:
    judges = Judges(encoder(), 0.5, TimeDiscriminator(8, 1), AdversarialLoss("non_saturating", weight=0.5))
    method = epsilon(judges)
    method.train_only(["encoder", "decoder", "discriminator"])
    losses = method.training_losses(batch())
    assert_close(losses["loss"], weigh(losses, flow=1.0, perceptual=0.5, generator=0.5, discriminator=1.0))
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.codec.encoder.parameters())
    assert set(method.makes) == {*method.eval().validation_step(batch(), 0).scalars, "generated", "references"}


def test_a_drawing_decoder_learns_and_is_drawn_again_alike() -> None:
    method = epsilon()
    TrainingSetup(["encoder", "decoder"], AdamW(3e-3)).prepare(method)
    before = epsilon().eval().validation_step(batch(), 0).scalars["flow"]
    losses_of(method, batch(), 60)
    first, second = (method.eval().validation_step(batch(), 0) for _ in range(2))
    assert first.scalars["flow"] < 0.7 * before
    assert torch.equal(torch.stack(first.generated), torch.stack(second.generated))  # type: ignore[arg-type]
