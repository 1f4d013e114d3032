"""The bridge around any blocks: what it encodes, generates, keeps and refuses."""

from __future__ import annotations

import math

import pytest
import torch
from bridge_parts import CODEC, encoded, metaquery, requests, tiny_vlm, wemmu
from torch.testing import assert_close

from umm_zoo.backbones import decoder_stack
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.frozen import FrozenBackbone
from umm_zoo.batch import Batch, Grid, Task, stacked
from umm_zoo.blocks.connectors import PositionMLP
from umm_zoo.blocks.details import VAEDetail
from umm_zoo.blocks.pathways import ExpertPathway, FrozenPathway
from umm_zoo.blocks.queries import LearnedQueries, NoisyQueries, ZeroQueries
from umm_zoo.errors import UserError
from umm_zoo.methods.conditioning import ConditionDropout, Guidance
from umm_zoo.methods.encoded_prompt import query_attention
from umm_zoo.outputs import Wanted


def image(seed=0):
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_row_does_not_depend_on_the_others():
    method = wemmu()
    together, grid = requests(0, 2, 1), Grid(3, 4)
    queries = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(0))
    values = method.condition(encoded(method, together), queries, grid).values
    start = 0
    for row, count in enumerate(together.image_counts):
        alone = Batch(
            [together.keys[row]],
            [together.conversations[row]],
            together.images[start : start + count],
            [count],
        )
        start += count
        own = method.condition(encoded(method, alone), queries[row : row + 1], grid)
        assert_close(own.values[0], values[row], rtol=0, atol=1e-4)


def test_request_is_encoded_once_per_mode_whatever_the_number_of_steps(monkeypatch):
    method = wemmu()
    for steps in (1, 5):
        calls = []
        prefix = method.vlm.prefix
        with monkeypatch.context() as patch:
            patch.setattr(method.vlm, "prefix", lambda inputs, prefix=prefix, calls=calls: calls.append(1) or prefix(inputs))
            method.sample(["Make it red."], [[image()]], num_steps=steps)
            assert len(calls) == 3  # nothing, image, full
            method.sample(["a red circle"], num_steps=steps)
            assert len(calls) == 5  # nothing, full
            method.sample(["a red circle"], num_steps=steps, guidance=Guidance.none())
            assert len(calls) == 6


def test_modes_of_a_request_share_the_draw_of_the_queries(monkeypatch):
    method, seen = wemmu(), []
    condition = method.condition
    monkeypatch.setattr(method, "condition", lambda prompt, queries, grid: seen.append(queries) or condition(prompt, queries, grid))
    method.sample(["Make it red."], [[image()]])
    assert len(seen) == 3 and all(torch.equal(own, seen[0]) for own in seen)


def test_images_do_not_depend_on_how_many_are_generated_at_a_time():
    method = wemmu()
    prompts, shown = ["a red circle", "Make it red.", "", "Both."], [[], [image()], [image(1)], [image(2), image(3)]]
    together = method.sample(prompts, shown, seed=7)
    for row in range(4):
        alone = method.sample([prompts[row]], [shown[row]], seed=7 + row)
        assert_close(alone[0], together[row], rtol=0, atol=1e-4)
    assert together.shape == (4, 3, 8, 8) and together.abs().max() <= 1
    assert method.sample(["a red circle"], size=(4, 12)).shape == (1, 3, 4, 12)


def test_checkpoints_hold_the_trained_parts_alone():
    method = wemmu()
    checkpoint = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"pathway", "connector", "detail"}
    assert not {key.split(".")[0] for key in metaquery().checkpoint_keys()} & {"vlm", "codec", "pathway"}


def test_frozen_parts_stay_in_evaluation_mode():
    method = wemmu().train()
    assert isinstance(method.codec, FrozenBackbone) and not method.decoder.training and method.pathway.training
    assert not method.vlm.model.model.language_model.training


@pytest.mark.parametrize(
    ("make", "kind", "trained"),
    [(wemmu, ExpertPathway, ["pathway", "connector", "detail"]), (metaquery, FrozenPathway, ["queries", "connector"])],
)
def test_gradient_checkpointing_runs_every_layer_again_and_changes_no_gradient(make, kind, trained, monkeypatch):
    gradients, again = [], []
    recomputed = decoder_stack.recomputed
    monkeypatch.setattr(decoder_stack, "recomputed", lambda *a, **settings: again.append(1) or recomputed(*a, **settings))
    for checkpointing in (False, True):
        torch.manual_seed(0)
        method = make(trained=trained, pathway=kind(gradient_checkpointing=checkpointing)).train()
        torch.manual_seed(1)
        method.training_losses(requests(1, 1))["loss"].backward()
        assert len(again) == (len(method.pathway.stack.layers) if checkpointing else 0)
        gradients.append([p.grad for p in method.parameters() if p.grad is not None])
    assert sum(gradient.any().item() for gradient in gradients[0]) > 10
    assert_close(gradients[1], gradients[0])


def test_no_activation_of_the_request_is_kept():
    method = wemmu().train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        losses = method.training_losses(requests(1, target=(4, 8)))  # 16 details and 8 queries
    length = encoded(method, requests(1)).prefix.attention_mask.shape[1]
    widths = {32, 40, 64}
    assert losses["loss"].requires_grad and length not in (24, 8) and (1, 24, 32) in kept
    assert not [shape for shape in kept if len(shape) == 3 and shape[1] == length and shape[2] in widths]


def test_metaquery_runs_its_queries_as_the_next_words_of_the_frozen_model():
    method, batch = metaquery(), requests(0, 1)
    prompt = encoded(method, batch)
    queries = method.draw_queries(prompt, Grid(4, 4))
    assert queries.shape == (2, 5, 32)  # fixed, whatever the size of the image
    placed = prompt.prefix, prompt.details, queries, method.queries.grid_for(Grid(4, 4))
    tokens, _, mask = method.pathway.arrange(*placed)
    expected = method.vlm.language_stack(copied=False)(tokens, prompt.prefix, prompt.prefix.text_positions(5), mask)
    assert torch.equal(mask, torch.ones(5, 5).tril().bool().expand(2, -1, -1))
    assert_close(method.pathway(*placed), expected)
    method.train().training_losses(batch)["loss"].backward()
    assert method.queries.table.grad.abs().sum(-1).all()
    assert not any(p.grad is not None for p in method.vlm.parameters())


def test_stored_latents_take_the_place_of_the_targets():
    method, batch = wemmu(), requests(0, 0)
    latents = stacked(method.codec.target_latents(batch))
    batch.extras["latents"] = latents + 1
    assert_close(stacked(method.codec.target_latents(batch)), latents + 1)


def test_validation_repeats_itself_and_generates_what_is_wanted():
    method, batch = wemmu(), requests(0, 1, 2, target=(4, 8))
    method.wanted = Wanted(frozenset({"attention"}))
    first, second = (method.validation_step(batch, 3) for _ in range(2))
    assert torch.equal(stacked(first.generated), stacked(second.generated))
    assert torch.equal(first.scalars["flow"], second.scalars["flow"])
    assert stacked(first.generated).shape == stacked(first.round_trips).shape == (3, 3, 4, 8)
    assert first.attention.num_rows == 2 and first.attention.bias.isfinite()
    question = Batch(["q"], [[{"role": "user", "text": "Say yes."}, {"role": "assistant", "text": "yes"}]])
    answered = method.validation_step(question, 0)
    assert answered.generated is None and len(answered.answers) == len(answered.nll) == len(answered.num_tokens) == 1
    method.wanted = Wanted(num_generated_batches=3)
    later = method.validation_step(batch, 3)
    assert later.generated is None and later.attention is None and torch.equal(later.scalars["flow"], first.scalars["flow"])


def test_sensitivity_compares_with_the_same_noise_under_the_instruction_to_change_nothing():
    method, batch = wemmu(), requests(1, 1, target=(32, 32))
    method.wanted = Wanted(frozenset({"unchanged"}))
    outputs = method.validation_step(batch, 0)
    assert torch.equal(stacked(outputs.unchanged_references), stacked(batch.images))
    assert stacked(outputs.unchanged).shape == (2, 3, 32, 32)
    unchanged = requests(1, 1, target=(32, 32))
    unchanged.tasks = [Task.RECONSTRUCT] * 2
    assert torch.equal(stacked(method.validation_step(unchanged, 0).generated), stacked(outputs.unchanged))
    assert method.validation_step(requests(0, 1, target=(32, 32)), 0).unchanged is None


def test_attention_bias_is_what_queries_pay_to_an_image_token_minus_a_word(monkeypatch):
    method, batch = wemmu(), requests(0, 1)  # the first row shows no image and does not count
    prompt, queries = encoded(method, batch), torch.randn(2, 6, 32)
    weights = torch.zeros(2, 4, 6, prompt.prefix.attention_mask.shape[1] + prompt.details.count + 6)
    weights[1, :, :, : prompt.image_mask.shape[1]] = torch.where(prompt.image_mask[1], 0.03, 0.01)
    halves = torch.where(torch.arange(4)[:, None, None] < 2, 1.0, 2.0)  # heads differ: the mean of logarithms, not of shares
    monkeypatch.setattr(method.pathway, "attention", lambda *_: iter([weights, weights * halves]))
    found = query_attention(method.pathway, prompt, queries, Grid(2, 3))
    assert_close(float(found.bias), 0.02 * (1 + 1.5) / 2)
    assert_close(float(found.log_bias), math.log(3))
    assert found.num_rows == 1


def test_user_errors_are_named():
    with pytest.raises(ValueError, match=r"queries.width is 8, vlm.width is 32"):
        wemmu(queries=NoisyQueries(8))
    with pytest.raises(ValueError, match=r"connector.out_dim is 9, decoder.condition_dim is 12"):
        wemmu(connector=PositionMLP(32, 9))
    with pytest.raises(ValueError, match=r"detail.latent_channels is 3, codec.latent_channels is 2"):
        wemmu(detail=VAEDetail(3, 32))
    with pytest.raises(ValueError, match=r"codec.latent_channels is 4, decoder.latent_channels is 2"):
        wemmu(codec=KLCodec.from_config({**CODEC, "latent_channels": 4}))
    with pytest.raises(ValueError, match=r"training.trained: found 'language_model'"):
        wemmu(["pathway", "language_model"])
    with pytest.raises(ValueError, match="found 5 x 8 px, expected multiples of 2 px"):
        wemmu().sample(["x"], size=(5, 8))
    with pytest.raises(ValueError, match="2 prompts and 1 groups"):
        wemmu().sample(["x", "y"], [[]])
    with pytest.raises(UserError, match="no image to generate"):
        wemmu().training_losses(Batch(["a"], [[{"role": "user", "text": "x"}]]))
    with pytest.raises(RuntimeError, match="attach"):
        _ = ExpertPathway().stack


def test_connector_starts_at_the_decoders_own_scale():
    method = wemmu()
    prompt = encoded(method, requests(0, 1))
    values = method.condition(prompt, torch.randn(2, 4, 32), Grid(2, 2)).values
    assert_close(values.square().mean(-1).sqrt(), torch.full((2, 4), 5.5**0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("queries", [ZeroQueries(32), LearnedQueries(32, 6)])
def test_other_queries_in_the_same_slot(queries):
    method = wemmu(queries=queries)
    assert method.training_losses(requests(1, 0))["loss"].isfinite()


def test_dropped_rows_are_trained_on_the_prompts_of_guidance():
    method = wemmu(dropout=ConditionDropout(text_to_image=1.0))
    seen = []
    embed = method.vlm.embed
    method.vlm.embed = lambda conversations, *rest, **more: seen.append(conversations) or embed(conversations, *rest, **more)
    method.training_losses(requests(0, 1))
    assert [row[0]["text"] for row in seen[0]] == ["Generate an image.", "<image>\nMake the circle green."]


def test_the_vlm_in_another_dtype():
    vlm = tiny_vlm().to(torch.bfloat16)
    method = wemmu(vlm=vlm, pathway=ExpertPathway(dtype="float32")).train()
    assert next(method.pathway.parameters()).dtype == torch.float32
    losses = method.training_losses(requests(1, 0))
    losses["loss"].backward()
    assert losses["loss"].dtype == torch.float32 and all(p.grad is not None for p in method.pathway.parameters())


def test_tokens_are_those_of_request_details_and_queries():
    method, batch = wemmu(), requests(0, 2, 1)
    method.dropout = ConditionDropout(0, 0, 0, 0, 0)
    method.training_losses(batch)
    lengths = [len(encoded(method, batch.select([row])).context.values[0]) for row in range(3)]
    cells, latents = 4 * 4, 4 * 4
    images = 3 * cells  # of the vision tower; as many detail tokens, padded to two images in each row
    assert method.token_counts["text"] == (sum(lengths) - images, 3 * max(lengths) - images)
    assert method.token_counts["image"] == (2 * images, images + 3 * 2 * cells)
    assert method.token_counts["query"] == (3 * latents, 3 * latents)
