"""Forge-and-Quench: nothing at scale 0, the forge's loss and guidance by hand, rows alone, what learns and what is injected."""

from __future__ import annotations

import forge_parts
import pytest
import torch
import torch.nn.functional as F
from forge_parts import method, rows
from learning import losses_of
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.backbones.recomputing import recomputed
from umm_zoo.batch import Tokens
from umm_zoo.blocks.connectors import MLPConnector
from umm_zoo.blocks.feature_forge import FeatureForge, normalised
from umm_zoo.blocks.queries import LearnedQueries
from umm_zoo.errors import UserError
from umm_zoo.methods.feature_sources import Forged, NoiseFeatures, OthersForged, TrueFeatures
from umm_zoo.methods.forge_and_quench import ForgeAndQuench
from umm_zoo.methods.requests import request_batch
from umm_zoo.outputs import Draws, Sampling, Wanted
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup

TEXTS = ("a red circle", "top left: a small blue square; background: grey", "two")
SIZE = Sampling(size=(8, 8))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_at_scale_0_it_is_the_text_to_image_model_bit_for_bit(guidance: float) -> None:
    made, alone, batch = method(guidance=guidance).eval(), forge_parts.model(guidance), rows(*TEXTS)
    plain = torch.stack(alone.generate(batch, [3, 4, 5], SIZE))
    assert isinstance(made, Draws) and not torch.equal(torch.stack(made.generate(batch, [3, 4, 5], SIZE)), plain)
    made.injection.scale = 0.0
    assert torch.equal(torch.stack(made.generate(batch, [3, 4, 5], SIZE)), plain)


def plain_states(made: ForgeAndQuench, text: str) -> Tensor:
    """States of the queries where prompt and queries are one causal sequence, and no keys are kept."""
    vlm, table = made.vlm, made.forge.queries.table
    inputs = vlm.embed([[{"role": "user", "text": text}]], None, [0], for_generation=True)
    embeddings = torch.cat([inputs.embeddings, table[None]], dim=1)
    ones = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    places = torch.arange(embeddings.shape[1]).expand(3, 1, -1)
    states: Tensor = vlm.run(embeddings, ones, places)
    return states[:, -len(table) :]


def velocity(made: ForgeAndQuench, text: str, noisy: Tensor, time: float) -> Tensor:
    """The forge's network on features ``[N, D]`` of one row, all by the library's own call."""
    connector, network = made.forge.connector, made.forge.denoiser.model
    condition = connector.out(F.gelu(connector.wide(plain_states(made, text))))
    places = torch.tensor([[0.0, row, column] for row in range(2) for column in range(2)])
    out: Tensor = network(
        hidden_states=noisy[None],
        encoder_hidden_states=condition,
        pooled_projections=torch.zeros(1, 6),
        timestep=torch.tensor([time]),
        img_ids=places,
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )[0][0]
    return out


def test_the_forges_loss_is_that_of_a_flow_of_the_encoders_tokens_under_the_queries_states() -> None:
    made, batch = method(("forge",)), rows(*TEXTS)
    made.forge.drop_prompt = 0.0
    torch.manual_seed(7)
    torch.rand(3)  # that decides which prompts are left empty
    times, noise = torch.rand(3), torch.randn(3, 16, 2, 2).flatten(2).transpose(1, 2)
    errors = []
    for row, text in enumerate(TEXTS):
        tokens = made.encoder.tokens(batch.requested[row][None])[0]
        centred = tokens - tokens.mean(-1, keepdim=True)
        features = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        t = float(times[row])
        predicted = velocity(made, text, (1 - t) * features + t * noise[row], t)
        errors.append((predicted - (noise[row] - features)).square().mean())
    torch.manual_seed(7)
    losses = made.training_losses(batch)
    assert set(losses) == {"forge_loss", "loss"}
    assert_close(losses["loss"], torch.stack(errors).mean(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_features_are_three_even_steps_of_guidance_against_the_empty_prompt() -> None:
    made = method().eval()
    x = made.noise([5])[0]
    for step in range(3):
        time = 1 - step / 3
        empty, full = (velocity(made, text, x, time) for text in ("", TEXTS[1]))
        x = x - (empty + 4.5 * (full - empty)) / 3
    assert_close(made.forged(rows(TEXTS[1]), [5])[0], x, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_row_depends_on_its_prompt_and_seed_alone() -> None:
    made, batch = method(guidance=2.0).eval(), rows(*TEXTS)
    together, features = made.generate(batch, [3, 4, 5], SIZE), made.forged(batch, [3, 4, 5])
    for row, seed in enumerate([3, 4, 5]):
        assert_close(made.forged(batch.select([row]), [seed])[0], features[row], atol=1e-5, rtol=1e-4)
        assert_close(made.generate(batch.select([row]), [seed], SIZE)[0], together[row], atol=1e-5, rtol=1e-4)
    other = made.generate(rows(TEXTS[0], "blue", "three"), [3, 9, 8], SIZE)
    assert_close(other[0], together[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trained", [("forge",), ("injection",), ("forge", "injection")])
def test_what_is_trained_gets_a_gradient_and_nothing_else(trained: tuple[str, ...]) -> None:
    made = method(trained)
    made.training_losses(rows(*TEXTS, sizes=((8, 8), (8, 4), (8, 8))))["loss"].backward()
    for name, part in made.parts().items():
        for key, parameter in part.named_parameters():
            learns = name in trained and parameter.grad is not None and bool(parameter.grad.isfinite().all())
            assert learns if name in trained else parameter.grad is None, f"{name}.{key}"
    with pytest.raises(UserError, match="'decoder'"):
        method(("forge", "decoder"))
    made.injection.scale = 0.0
    made.train_only(["forge"])
    with pytest.raises(UserError, match="scale: found 0"):
        made.train_only(["injection"])


def test_images_of_unequal_sizes_are_seen_with_their_own_features() -> None:
    made, batch = method(("injection",), drop_text=0.0), rows(*TEXTS, sizes=((8, 8), (8, 4), (8, 8)))
    features, condition = made.true_features(batch), made.condition(list(TEXTS))
    assert features.shape == (3, 4, 16) and made.encoder.tokens(batch.requested[1][None]).shape == (1, 4, 16)
    found = made.image_terms(batch, features, condition, torch.Generator().manual_seed(0))["loss"]
    drawn, errors = torch.Generator().manual_seed(0), []
    for places in ([0, 2], [1]):
        latents = torch.stack([made.codec.encode(batch.requested[row][None])[0] for row in places])
        times, noise = torch.rand(len(places), generator=drawn), torch.randn(latents.shape, generator=drawn)
        for own, row in enumerate(places):
            noisy = (1 - times[own]) * latents[own] + times[own] * noise[own]
            with made.injection.features(features[row : row + 1]):
                predicted = made.decoder(noisy[None], times[own][None], made.condition([TEXTS[row]]))
            errors.append((predicted[0] - (noise[own] - latents[own])).square().mean())
    assert_close(found, torch.stack(errors).mean(), atol=1e-5, rtol=1e-4)


def test_layers_that_are_computed_again_see_the_features_of_their_own_group_of_sizes() -> None:
    batch, found = rows(*TEXTS, sizes=((8, 8), (8, 4), (8, 8))), []
    for again in (False, True):
        made = method(("injection",))
        if again:
            made.decoder.model.enable_gradient_checkpointing(recomputed)
        torch.manual_seed(5)
        made.training_losses(batch)["loss"].backward()
        found.append({key: parameter.grad for key, parameter in made.injection.named_parameters()})
    assert made.decoder.model.is_gradient_checkpointing and found[0]
    for key, gradient in found[0].items():
        assert_close(found[1][key], gradient, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_sources_inject_what_they_say() -> None:
    made, batch, seeds = method().eval(), rows(*TEXTS), [1, 2, 3]
    forged = made.forged(batch, seeds)
    assert torch.equal(Forged()(made, batch, seeds), forged)
    assert torch.equal(OthersForged()(made, batch, seeds), forged[[1, 2, 0]])
    assert torch.equal(TrueFeatures()(made, batch, seeds), made.true_features(batch))
    assert_close(made.true_features(batch).square().mean(-1), torch.ones(3, 4), atol=1e-3, rtol=0)
    noise = NoiseFeatures()(made, batch, seeds)
    assert torch.equal(noise, made.noise(seeds)) and torch.equal(NoiseFeatures()(made, batch.select([2]), [3])[0], noise[2])
    with pytest.raises(UserError, match="one row"):
        OthersForged()(made, batch.select([0]), [1])
    with pytest.raises(UserError, match="no image to generate"):
        TrueFeatures()(made, request_batch(["a red circle"]), [1])


@torch.no_grad()
def test_validation_generates_from_the_row_whatever_it_stands_among() -> None:
    made, batch = method().eval(), rows(*TEXTS, sizes=((8, 8), (8, 4), (8, 8)))
    made.wanted = Wanted()
    outputs = made.validation_step(batch, 0)
    assert set(outputs.scalars) | {"generated", "round_trips"} == set(made.makes)
    assert [image.shape[1:] for image in outputs.generated or []] == [(8, 8), (8, 4), (8, 8)]
    alone = made.validation_step(batch.select([2]), 5)
    assert_close((alone.generated or [])[0], (outputs.generated or [])[2], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_decoder_of_half_precision_takes_the_injection_of_single_precision() -> None:
    parts = forge_parts.text_to_image()
    half = {"text_encoder": parts["text_encoder"].bfloat16(), "decoder": parts["decoder"].bfloat16()}
    for image in method(**half).eval().generate(rows(*TEXTS), [1, 2, 3], SIZE):
        assert image.isfinite().all()


def test_forge_and_injection_learn_one_batch() -> None:
    made = method()
    TrainingSetup(["forge", "injection"], AdamW(1e-2)).prepare(made)
    losses = losses_of(made, rows(*TEXTS), steps=40)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"forge.connector.out_dim is 10, forge.denoiser.condition_dim is 12"):
        method(forge=FeatureForge(LearnedQueries(24, 5), MLPConnector(24, 10), forge_parts.forge().denoiser))
    made = method()
    two = made.injection.features(torch.zeros(2, 4, 16))
    with pytest.raises(ValueError, match="found 2 rows, expected as many as latents, 3"), two:
        made.decoder(torch.zeros(3, 4, 4, 4), torch.ones(3), Tokens(torch.zeros(3, 2, 20)))


def test_half_precision_tokens_are_normalised_in_single_precision() -> None:
    tokens = torch.tensor([[300.0, 301.0, 302.0, 303.0]], dtype=torch.bfloat16)
    assert_close(normalised(tokens), F.layer_norm(tokens.float(), (4,)), atol=0, rtol=0)
