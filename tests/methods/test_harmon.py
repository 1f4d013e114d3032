"""Harmon's data flow, losses, gradients and rounds, each against a plain computation of one row."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from harmon_parts import PARTS, ROWS, backbone, method, rows, still
from learning import losses_of
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.backbones.harmon import parts_of_harmon
from umm_zoo.batch import Grid, Task, Tokens, stacked
from umm_zoo.blocks.denoisers import MLPRegressionHead
from umm_zoo.blocks.masked_autoencoder import PromptedDecoder
from umm_zoo.blocks.masking import CosineUnmasking
from umm_zoo.blocks.token_head import TokenMLPHead
from umm_zoo.blocks.transformer import as_tokens
from umm_zoo.errors import UserError
from umm_zoo.methods.harmon import Harmon
from umm_zoo.methods.requests import request_batch
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.gaussian import GaussianNoisePrediction
from umm_zoo.objectives.learned_variance import LearnedRangeVariance
from umm_zoo.objectives.regression import MeanSquaredError
from umm_zoo.objectives.several_draws import SeveralDraws
from umm_zoo.outputs import Answers, Draws, Reconstructs, RefusesRows, Sampling
from umm_zoo.training.optimization import AdamW, Constant
from umm_zoo.training.setup import TrainingSetup

TEXTS = ["two small green circles", "red"]


def instructed(own: Harmon, text: str, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder gives of one row's visible tokens ``[1, N, C]``, and what the language model adds, by its own modules."""
    vlm, kept = own.vlm, own.vlm.encoder.num_buffers
    seen = vlm.encoder(tokens, hidden, Grid(4, 4)).values
    template = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    words = torch.tensor([vlm.tokenizer(template, add_special_tokens=False).input_ids])
    z = vlm.mlp_in(seen)
    whole = torch.cat([vlm.text_model.embed_tokens(words), z[:, kept:], z[:, :kept]], dim=1)
    states = vlm.text_model(inputs_embeds=whole).last_hidden_state[:, words.shape[1] :]
    return seen, vlm.mlp_out(torch.cat([states[:, -kept:], states[:, :-kept]], dim=1))


def test_buffers_pass_the_language_model_behind_the_visible_tokens_and_its_states_are_added() -> None:
    own, tokens, hidden = method().eval(), torch.randn(2, 16, 3), torch.rand(2, 16) < 0.6
    assert hidden.sum(1)[0] != hidden.sum(1)[1]
    encoded, _ = own.vlm.instruct(own.vlm.encoder(tokens, hidden), own.vlm.prompts(TEXTS))
    for row, text in enumerate(TEXTS):
        seen, added = instructed(own, text, tokens[[row]], hidden[[row]])
        assert_close(encoded.values[row, : seen.shape[1]], (seen + added)[0], atol=1e-5, rtol=1e-5)


def test_prompts_encoded_once_give_the_same_tokens() -> None:
    own, tokens, hidden = method().eval(), torch.randn(3, 16, 3), torch.rand(3, 16) < 0.6
    prompts = own.vlm.prompts(TEXTS)
    cached = own.vlm.encode_prompts(prompts, torch.tensor([1, 0, 1]))
    seen = own.vlm.encoder(tokens, hidden)
    for _ in range(2):  # the cache does not grow
        found, states = own.vlm.instruct(seen, cached)
        expected, read = own.vlm.instruct(seen, own.vlm.prompts([TEXTS[1], TEXTS[0], TEXTS[1]]))
        assert_close(found.values[seen.counted], expected.values[seen.counted], atol=1e-5, rtol=1e-5)
        assert_close(states.values[states.mask], read.values[read.mask], atol=1e-5, rtol=1e-5)


def test_a_whole_image_stands_where_its_marker_is_with_the_buffers_behind() -> None:
    own, batch = backbone(), rows([(1, "red", None)])
    inputs = own.inputs_of(batch)
    tokens = as_tokens(own.codec.encode(stacked(batch.images)))
    seen = own.mlp_in(own.encoder(tokens, torch.zeros(1, 16, dtype=torch.bool)).values)
    assert_close(inputs.embeddings[inputs.image_mask], torch.cat([seen[0, 5:], seen[0, :5]]))
    assert inputs.image_mask.sum() == 21


def test_the_language_loss_sends_a_tenth_of_its_gradient_into_what_it_reads() -> None:
    gradients = []
    for factor in (1.0, 0.1):
        own = backbone(text_gradient=factor)
        own(own.inputs_of(rows([(1, "red", None)]))).loss.backward()
        gradients.append([own.mlp_in[0].weight.grad, own.encoder.z_proj.weight.grad, own.lm_head.weight.grad])
    assert_close(gradients[1][0], 0.1 * gradients[0][0])
    assert_close(gradients[1][1], 0.1 * gradients[0][1])
    assert_close(gradients[1][2], gradients[0][2])


def test_the_image_loss_is_the_mean_over_rows_of_the_mean_over_hidden_tokens() -> None:
    own, batch = still(image_weight=0.3), rows()
    found, expected = own.training_losses(batch), []
    for row in (1, 3, 5):
        tokens, hidden = as_tokens(own.vlm.codec.encode(batch.targets[row][None])), (torch.arange(16) < 6)[None]
        seen, added = instructed(own, f"Generate an image: {ROWS[row][2]}", tokens, hidden)
        encoded = own.vlm.encoder(tokens, hidden)
        encoded.values = seen + added
        made = own.head.regress(own.decoder(encoded))[0, :6]
        expected.append((made - tokens[0, :6]).square().mean())
    assert_close(found["image_loss"], torch.stack(expected).mean())
    assert_close(found["loss"], found["text_loss"] + 0.3 * found["image_loss"])
    assert own.units(batch)["images"] == 3


def test_no_hidden_token_reaches_the_loss_but_as_a_target() -> None:
    """What regression makes of a row whose hidden tokens are others is the same."""
    own = still().eval()
    tokens, hidden = torch.randn(2, 16, 3), torch.arange(16).expand(2, 16) < 6
    other = tokens.masked_fill(hidden[..., None], 9.0)
    prompts = own.vlm.prompts(TEXTS)
    assert_close(
        own.hidden_tokens.states(tokens, hidden, Grid(4, 4), prompts), own.hidden_tokens.states(other, hidden, Grid(4, 4), prompts)
    )


def test_dropped_prompts_say_nothing_and_tasks_without_words_too() -> None:
    own, batch = still(), rows([ROWS[1], ROWS[3]])
    dropped = own.image_loss(batch, torch.tensor([True, True]))
    batch.tasks = [Task.UNCONDITIONAL] * 2
    assert_close(own.image_loss(batch, torch.tensor([False, False])), dropped)
    assert own._texts(batch, [False, False]) == ["Generate an image."] * 2
    batch.tasks = [Task.TEXT_TO_IMAGE] * 2
    assert own._texts(batch, [False, True]) == [f"Generate an image: {ROWS[1][2]}", "Generate an image."]


@pytest.mark.parametrize("chosen", [[1, 3, 5], [0, 2, 4]])
def test_a_batch_of_one_kind_has_the_losses_of_its_rows_and_reaches_every_parameter(chosen: list[int]) -> None:
    own = still()
    found, whole = own.training_losses(rows().select(chosen)), own.training_losses(rows())
    here, missing = ("image_loss", "text_loss") if 1 in chosen else ("text_loss", "image_loss")
    assert_close(found[here], whole[here])
    assert found[missing] == 0
    found["loss"].backward()
    reached = {name for name, p in own.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in own.named_parameters() if p.requires_grad}


def test_targets_of_several_sizes_each_count_as_alone() -> None:
    own, batch = still(), rows([ROWS[1], ROWS[3]])
    batch.targets[1] = torch.rand(3, 8, 24) * 2 - 1
    alone = [own.image_loss(batch.select([row]), torch.tensor([False])) for row in range(2)]
    assert_close(own.image_loss(batch, torch.tensor([False, False])), torch.stack(alone).mean())


def test_a_step_trains_the_parts_named_and_no_other() -> None:
    own = method()
    own.train_only(["decoder", "head"])
    TrainingSetup(["decoder", "head"], AdamW(lr=1e-2), Constant()).prepare(own)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    losses_of(own, rows(), 1)
    changed = {name for name, value in own.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed <= own.part_keys(["decoder", "head"])
    with pytest.raises(UserError, match="codec"):
        method().train_only(["codec"])


def test_it_learns_both_at_once() -> None:
    own = still()
    TrainingSetup(PARTS, AdamW(lr=1e-2), Constant()).prepare(own)
    batch = rows()
    first = {name: value.item() for name, value in own.training_losses(batch).items()}
    losses_of(own, batch, 50)
    last = {name: value.item() for name, value in own.training_losses(batch).items()}
    assert last["text_loss"] < 0.2 * first["text_loss"] and last["image_loss"] < 0.3 * first["image_loss"]


HEADS = [
    {},
    {"objective": GaussianNoisePrediction(sampling_steps=4, first_index=900)},
    {"head": TokenMLPHead(12, 3, 16, 2, learned_variance=True), "objective": LearnedRangeVariance(2, 4, first_index=900)},
    {"head": MLPRegressionHead(12, 3), "objective": SeveralDraws(MeanSquaredError(), 2)},
]


@pytest.mark.parametrize("parts", HEADS)
def test_an_image_depends_on_its_prompt_and_seed_alone(parts: dict) -> None:
    own = method(**parts, guidance=2.0).eval()
    together, alone = own.sample([*TEXTS, *TEXTS], seed=5), own.sample(TEXTS[:1], seed=7)
    assert together.shape == (4, 3, 16, 16)
    assert_close(alone[0], together[2], atol=1e-4, rtol=1e-4)
    assert "head" not in parts or parts["head"].__class__ is TokenMLPHead or not own.objective.num_noises
    assert not torch.allclose(together[0], together[1])
    assert own.training_losses(rows())["loss"].isfinite()


def test_guidance_scales_the_difference_of_the_two_branches() -> None:
    """Of a regression in one round: the image is linear in the scale."""
    own = still(num_rounds=1).eval()
    none, one, three = (own.generate(request_batch(["red"]), [0], Sampling(guidance=scale))[0] for scale in (0.0, 1.0, 1.1))
    assert not torch.allclose(none, one, atol=1e-3)
    free = (none.abs() < 1) & (one.abs() < 1) & (three.abs() < 1)
    assert free.any()
    assert_close(three[free], (none + 1.1 * (one - none))[free], atol=1e-4, rtol=1e-4)


def test_every_round_sees_what_earlier_ones_have_made(monkeypatch: pytest.MonkeyPatch) -> None:
    own, hidden = still(num_rounds=4).eval(), []
    seen = own.vlm.encoder.forward
    monkeypatch.setattr(
        own.vlm.encoder, "forward", lambda tokens, places, grid: hidden.append(places) or seen(tokens, places, grid)
    )
    own.sample(["red"], guidance=1.0)
    assert [int(own.sum()) for own in hidden] == [16, 14, 11, 6]
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(hidden))


def test_a_reconstruction_copies_no_token_and_depends_on_the_image_and_seed_alone() -> None:
    own, images = still().eval(), rows([(2, None, None)]).images
    made = own.reconstruct(images, seed=3)
    assert_close(own.reconstruct(images[1:], seed=4)[0], made[1], atol=1e-4, rtol=1e-4)
    through = own.round_trip(images)[0]
    assert ((made[0] - through).abs() > 1e-4).all(0).float().mean() > 0.9


def test_a_decoder_that_sees_the_prompt_is_told_it_in_training_and_in_sampling_alike() -> None:
    decoder = PromptedDecoder(24, encoder_width=16, side=4, width=12, depth=1, heads=2, num_buffers=5, dropout=0.0)
    own = still(decoder=decoder, num_rounds=1).eval()
    hidden = torch.ones(1, 16, dtype=torch.bool)
    states = own.hidden_tokens.states(torch.zeros(1, 16, 3), hidden, Grid(4, 4), own.vlm.prompts(["Generate an image: red"]))
    expected = own._images(own.head.regress(states), Grid(4, 4))[0]
    assert_close(own.generate(request_batch(["red"]), [0], Sampling(guidance=1.0))[0], expected, atol=1e-4, rtol=1e-4)


def test_what_it_can_do_and_what_it_refuses() -> None:
    own = method().eval()
    assert isinstance(own, Answers) and isinstance(own, Draws) and isinstance(own, Reconstructs) and isinstance(own, RefusesRows)
    assert own.generate(request_batch(["red"]), [0], Sampling(size=(8, 24)))[0].shape == (3, 8, 24)
    with pytest.raises(UserError, match="generates from text alone"):
        own.check_rows(rows([(0, "red", None), (1, None, "red")]), scoring=False)
    own.vlm.max_length = 40
    with pytest.raises(UserError, match="max_length") as caught:
        own.check_rows(rows([(0, "red", None), (0, None, "red"), (0, None, "red " * 90)]), scoring=False)
    assert caught.value.row == 2
    with pytest.raises(UserError, match="4 rounds for 2 tokens"):
        own.try_images(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 8))
    with pytest.raises(UserError, match="rounds are those"):
        own.generate(request_batch(["red"]), [0], Sampling(num_steps=3))
    with pytest.raises(UserError, match="20 rounds for 16 tokens"):
        method(num_rounds=20)
    with pytest.raises(UserError, match="channels"):
        method(head=TokenMLPHead(12, 5, 16, 2))
    with pytest.raises(UserError, match=r"decoder.prompt_dim: found 7, expected 24"):
        method(decoder=PromptedDecoder(7, 16, 4, 12, 2, 2, num_buffers=5))


@pytest.mark.parametrize(
    ("head", "objective"),
    [
        (TokenMLPHead(12, 3, 16, 2, learned_variance=True), FlowMatching()),
        (TokenMLPHead(12, 3, 16, 2), SeveralDraws(LearnedRangeVariance(1, 4))),
        (MLPRegressionHead(12, 3), FlowMatching()),
        (TokenMLPHead(12, 3, 16, 2), SeveralDraws(MeanSquaredError())),
    ],
)
def test_a_head_that_the_objective_does_not_call_is_refused(head: Any, objective: Any) -> None:
    with pytest.raises(ValueError, match=r"head and objective: .* cannot train"):
        method(head=head, objective=objective)
    method(head=TokenMLPHead(12, 3, 16, 2, learned_variance=True), objective=SeveralDraws(LearnedRangeVariance(1, 4)))


def test_names_are_those_of_the_release() -> None:
    places = {"language_model": "llm.", "mlp_in": "proj_in.", "mlp_out": "proj_out.", "encoder": "mar.", "decoder": "mar."}
    places["head"] = "mar.diffloss.net."
    own = {name: part.state_dict() for name, part in method().parts().items() if name in places}
    release = {f"{places[part]}{name}": value for part, state in own.items() for name, value in state.items()}
    found = parts_of_harmon({**release, "mar.class_emb.weight": torch.zeros(1), "vae.encoder.conv_in.weight": torch.zeros(1)})
    assert found == own and {"model.norm.weight", "lm_head.weight"} <= set(found["language_model"])
    with pytest.raises(UserError, match=r"tensor 'model.norm.weight'"):
        parts_of_harmon({"model.norm.weight": torch.zeros(1)})


def test_validation_gives_the_fields_of_both_kinds_every_time_the_same() -> None:
    own, batch = method().eval(), rows()
    first, again = (own.validation_step(batch.select([1, 3]), 0) for _ in range(2))
    assert first.scalars == again.scalars and len(first.generated) == len(first.round_trips) == 2
    assert torch.equal(first.generated[0], again.generated[0])
    answers = own.validation_step(batch.select([0, 2]), 0)
    assert len(answers.answers) == 2 and answers.counts["image_loss"] == 0 and float(answers.num_tokens.sum()) > 4


def test_bfloat16_weights_train_and_sample() -> None:
    own = method().to(torch.bfloat16)
    own.training_losses(rows())["loss"].backward()
    assert own.eval().sample(["red"]).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method()
        assert mixed.training_losses(rows())["loss"].isfinite() and mixed.eval().sample(["red"]).dtype == torch.float32


def test_several_draws_share_a_condition() -> None:
    own = SeveralDraws(MeanSquaredError(), 3)
    losses = own.losses(MLPRegressionHead(4, 2), torch.randn(5, 2, 1, 1), Tokens(torch.randn(5, 1, 4)))
    assert losses.shape == (3, 5)
    assert_close(losses[0], losses[2])
    assert CosineUnmasking(3).counts(3) == [1, 1, 1]
