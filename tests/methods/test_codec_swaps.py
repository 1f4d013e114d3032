"""Tokenizers and drawing codecs in the place of the usual codec: Janus, UAE's renderer of tokens, bridges, text to image, ROSS."""

from __future__ import annotations

from typing import Any

import bridge_parts
import pytest
import torch
from janus_parts import PARTS, rows
from learning import losses_of
from tiny_configs import SANA, T5, clip
from torch.testing import assert_close
from uae_parts import batch as caption_batch
from unified_parts import unified_stage

from tests.backbones.janus_parts import JANUS, janus, spread
from umm_zoo.backbones.diffusion_codec import ConvEncoder, DiffusionCodec, UNetPixelDenoiser
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.backbones.janus import Janus as JanusBackbone
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.sana import Sana
from umm_zoo.backbones.text_encoder import TextEncoder
from umm_zoo.backbones.visual_tokenizer import Branch, VisualTokenizer
from umm_zoo.batch import Batch, stacked
from umm_zoo.blocks.bottlenecks import Bottleneck, LinearProjection
from umm_zoo.blocks.code_heads import CodeHead, DepthHead, GroupHead, SoftmaxHead
from umm_zoo.blocks.pixel_decoders import ViTPixelDecoder
from umm_zoo.blocks.quantizers import BinaryQuantizer, NoQuantizer, Quantizer, ResidualQuantizer, VectorQuantizer
from umm_zoo.blocks.targets import CodecLatents
from umm_zoo.methods.janus import Janus
from umm_zoo.methods.requests import request_batch
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.outputs import Wanted
from umm_zoo.pretraining.text_to_image import TextToImage
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup


def tokenizer(*quantizers: Quantizer, patch: int = 4, side: int = 8) -> VisualTokenizer:
    """On the last layer the pixels, on the one before it a second branch where there is one."""
    torch.manual_seed(0)
    names = ("pixel", "semantic")
    branches = {
        name: Branch(Bottleneck(LinearProjection(16, own.dim), own, LinearProjection(own.dim, 16)), layer=-1 - place)
        for place, (name, own) in enumerate(zip(names, quantizers, strict=False))
    }
    encoder = CLIPVisionFeatures.from_config(
        {key: value for key, value in clip(image_size=side, patch_size=patch).items() if key != "model_type"}
    )
    made = VisualTokenizer(encoder, branches, ViTPixelDecoder(16, patch, 16, 1, 2))
    spread(made)
    return made.eval()


def residual() -> ResidualQuantizer:
    return ResidualQuantizer([VectorQuantizer(3, 9, normalised=False)], 4)


def drawing_codec(channels: int = 2) -> DiffusionCodec:
    torch.manual_seed(0)
    parts = ConvEncoder(channels, [8, 8], 1, 4), UNetPixelDenoiser(channels, [8, 8], 1, 4)
    return DiffusionCodec(*parts, FlowMatching(num_steps=2))


#: Codecs of several codes per token: QLIP's two groups of 14 bits, DualToken's two times four residual codes, 3 and 2 bits.
SEVERAL: dict[str, Any] = {
    "qlip": lambda: (tokenizer(BinaryQuantizer(28)), GroupHead(24, bits=28)),
    "dualtoken": lambda: (tokenizer(residual(), residual()), DepthHead(24, [9] * 8, layers=2, heads=3)),
    "one": lambda: (tokenizer(BinaryQuantizer(4)), DepthHead(24, [16], layers=1, heads=3)),
    "uneven": lambda: (tokenizer(BinaryQuantizer(5, code_bits=3)), SoftmaxHead(24, [8, 4])),
}


def unified(codec: VisualTokenizer, head: CodeHead | None) -> JanusBackbone:
    """The weights of model and head are spread; those of the codec are its own."""
    state = {key: value.clone() for key, value in codec.state_dict().items()}
    model = janus({**JANUS, "vq_config": {"embed_dim": 6}}, codec=codec, head=head)
    model.codec.load_state_dict(state)
    return model


def method(name: str) -> Janus:
    made = Janus(unified(*SEVERAL[name]()), guidance=2.0)
    made.train_only(PARTS)
    made.wanted = Wanted(max_new_tokens=3)
    return made.train()


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", SEVERAL)
def test_codes_are_drawn_from_the_distribution_that_they_are_scored_by(name: str, scale: float) -> None:
    codec, head = SEVERAL[name]()
    model = unified(codec, head)
    prompts = model.image_prompt(["red", "a large blue square"])
    drawn = model.sample_image(prompts, [1, 2, 3, 4], scale, temperature=0.7)
    assert_close(model.image_log_probs(prompts, drawn.ids, scale, temperature=0.7), drawn.log_probs, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.sample_image(model.image_prompt(["red"]), [2], scale, temperature=0.7).ids[0], drawn.ids[1])
    assert (drawn.ids.unflatten(1, (4, -1)) < torch.tensor(codec.code_sizes)).all() and len(drawn.ids.unique(dim=0)) > 2
    assert_close(model.images_of(drawn.ids), codec.images(drawn.ids.view(4, 4, -1)))


@pytest.mark.parametrize("name", SEVERAL)
def test_every_code_of_every_token_is_learnt(name: str) -> None:
    own, batch = method(name), rows()
    losses = own.training_losses(batch)
    losses["loss"].backward()
    for part in ("image_head", "image_embeddings", "language_model"):
        for key, parameter in own.parts()[part].named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{part}.{key}"
    logits = own.vlm.image_logits(*own._image_inputs(batch.select([1, 3, 5]), torch.zeros(3, dtype=torch.bool)))
    count = 4 * own.vlm.codes_per_token
    assert logits.shape == (3, count, own.vlm.codec.num_codes)
    outputs = own.eval().validation_step(batch.select([1, 3, 5]), 0)
    assert outputs.generated is not None and outputs.round_trips is not None
    assert_close(stacked(outputs.round_trips), own.vlm.codec(stacked(batch.requested)))


def test_a_model_of_several_codes_learns_its_images() -> None:
    own, batch = method("dualtoken"), rows().select([1, 3, 5])
    TrainingSetup(PARTS, AdamW(3e-3)).prepare(own)
    losses = losses_of(own, batch, 40)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["qlip", "dualtoken"])
def test_stored_codes_give_the_same_loss_and_call_no_encoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, batch = method(name).eval(), rows()
    stored = own.precomputable()["codes"]
    codes = stored.compute(batch)
    assert codes.dtype == torch.int and codes.shape == (3, 4, own.vlm.codes_per_token) and stored.per == "target"
    own.dropout = 0.0
    expected = own.training_losses(batch)["image_loss"]
    batch.extras, batch.entries = {"codes": codes}, {"codes": [int(has) for has in batch.has_target]}
    monkeypatch.setattr(VisualTokenizer, "tokenize", None)
    assert_close(own.training_losses(batch)["image_loss"], expected)


def test_heads_that_do_not_fit_the_codes_are_refused() -> None:
    config = {**JANUS, "vq_config": {"embed_dim": 6}}
    with pytest.raises(ValueError, match="found none for the 2 codes of a token"):
        janus(config, codec=tokenizer(BinaryQuantizer(28)))
    with pytest.raises(
        ValueError, match=r"GroupHead of width 24 over codes \[4096, 4096\], expected width 24 and .*\[16384, 16384\]"
    ):
        janus(config, codec=tokenizer(BinaryQuantizer(28)), head=GroupHead(24, bits=24))
    with pytest.raises(ValueError, match="whose quantizer has no codes"):
        janus(config, codec=tokenizer(NoQuantizer(6)))


def test_a_head_of_its_own_is_not_lost_in_the_library_s_format(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="a GroupHead, which the library's format has no place for"):
        unified(*SEVERAL["qlip"]()).save(tmp_path)


def test_uae_learns_from_images_of_several_codes() -> None:
    """Each code is an action of its own: as many weights as codes."""
    stage = unified_stage(("language_model",), guidance=2.0, vlm=unified(*SEVERAL["dualtoken"]()))
    losses = stage.training_losses(caption_batch())
    losses["loss"].backward()
    assert losses["loss"].isfinite() and any(
        p.grad is not None and p.grad.any() for p in stage.parts()["language_model"].parameters()
    )
    drawn = stage.renderer.draw(stage.vlm, ["red", "blue"], [3, 4])
    assert drawn.ids.shape == drawn.log_probs.shape == (2, 4 * 8)
    assert stacked(stage.renderer.generate(stage.vlm, ["red", "blue"], [3, 4])).shape == (2, 3, 8, 8)


#: Codecs of a bridge's decoder: values of bits, features of a frozen encoder (a representation autoencoder), latents of a flow.
CODECS: dict[str, Any] = {
    "bits": lambda: tokenizer(BinaryQuantizer(2), patch=2, side=8),
    "features": lambda: tokenizer(NoQuantizer(2), patch=2, side=8),
    "flow": drawing_codec,
}


@pytest.mark.parametrize("name", CODECS)
def test_a_bridge_generates_in_its_latents(name: str) -> None:
    codec: LatentCodec = CODECS[name]()
    bridge = bridge_parts.metaquery(codec=codec)
    batch = bridge_parts.requests(0, 1)
    losses = bridge.training_losses(batch)
    assert losses["loss"].isfinite()
    images = bridge.eval().generate(batch, [5, 6])
    assert [tuple(image.shape) for image in images] == [(3, 8, 8)] * 2
    assert_close(stacked(bridge.generate(batch, [5, 6])), stacked(images))  # a decoder that draws has a seed of its own


@pytest.mark.parametrize("name", CODECS)
def test_a_decoder_from_texts_is_trained_on_its_latents(name: str) -> None:
    codec: LatentCodec = CODECS[name]()
    sana = {**SANA, "in_channels": 2, "out_channels": 2}
    made = TextToImage(TextEncoder.from_config({**T5, "d_model": 16}), Sana.from_config(sana), codec, FlowMatching(num_steps=2))
    made.train_only(["text_encoder", "decoder"])
    targets = torch.rand(2, 3, 8, 8) * 2 - 1
    batch = Batch(["a", "b"], [[{"role": "user", "text": "red"}]] * 2, targets=targets)  # type: ignore[list-item]
    assert made.training_losses(batch)["loss"].isfinite()
    assert stacked(made.eval().generate(request_batch(["red"]), [1])).shape == (1, 3, 8, 8)
    stored = made.precomputable()["latents"].compute(batch)
    assert_close(stored, codec.encode(targets))


@pytest.mark.parametrize("name", CODECS)
def test_ross_s_targets_are_its_latents(name: str) -> None:
    codec: LatentCodec = CODECS[name]()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    found = CodecLatents(codec, grid=4, pack=1, sampled=False).compute(images, None)
    assert_close(found, codec.encode(images).flatten(2).transpose(1, 2))
