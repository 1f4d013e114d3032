"""UAE: what reaches the decoder from a caption, the first stage, and what both reinforcement stages train and leave alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from uae_parts import PROMPT, Redness, batch, first_stage, images, renderer, second_stage, third_stage, unequal_batch, vlm

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.batch import Batch, stacked
from umm_zoo.errors import UserError
from umm_zoo.methods.requests import request_batch
from umm_zoo.methods.uae.captions import CAPTION_PROMPT, CaptionSampling
from umm_zoo.methods.uae.readers import AnswerStatesReader, BaseTextReader, TextOnlyReader
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.methods.uae.rollouts import IndependentNoise, Rollouts, SharedNoise
from umm_zoo.metrics import Means
from umm_zoo.objectives.flow_grpo import FlowGRPO
from umm_zoo.objectives.grpo import GRPO, SequenceMean
from umm_zoo.outputs import Answers, Draws, Reconstructs, ReconstructsFromCaptions, RollsOut, Sampling, Wanted
from umm_zoo.rewards import Reward


def touched(method: nn.Module) -> set[str]:
    """Parts with a non-zero gradient."""
    return {name for name, part in method.parts().items() if any(p.grad is not None and p.grad.any() for p in part.parameters())}


def stir(method: nn.Module) -> None:
    """Move the adapters off zero, where only half of their parameters have a gradient."""
    with torch.no_grad():
        for part in (method.adapter, method.decoder_adapter):
            for parameter in [] if part is None else part.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def test_the_caption_prompt_has_the_releases_blanks():
    """Of its released string: two at the ends of the first two lines, one before the image."""
    lines = CAPTION_PROMPT.split("\n")
    assert [len(line.removesuffix("<image>")) - len(line.removesuffix("<image>").rstrip(" ")) for line in lines] == [2, 2, 1]
    assert len(CAPTION_PROMPT) == 279 and CAPTION_PROMPT.count("**") == 2


# -- reading -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_caption_is_read_as_a_turn_of_its_own_role_with_the_opening_of_an_answer():
    model = vlm().eval()
    found = TextOnlyReader()(model, ["a red circle"], None)
    ids = model.tokenizer("<|im_start|>generate\na red circle<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    inputs = model.embed([[{"role": "generate", "text": "a red circle"}]], None, [0], for_generation=True)
    assert inputs.token_ids[0].tolist() == ids
    expected = model.model.model.language_model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    assert_close(found.values, expected, atol=1e-5, rtol=1e-5)


def test_text_alone_passes_and_the_answer_states_leak_the_image():
    model = vlm().eval()
    for reader, leaks in ((TextOnlyReader(), False), (AnswerStatesReader(), True)):
        one, other = (reader(model, ["a red circle"], images(1, seed)).values for seed in (0, 1))
        assert torch.equal(one, other) != leaks
    states = AnswerStatesReader()(model, ["a red circle", "red"], images(2))
    assert states.mask.sum(1).tolist() == [len(model.tokenizer(text)["input_ids"]) + 1 for text in ("a red circle", "red")]
    alone = AnswerStatesReader()(model, ["red"], images(2)[1:])
    assert_close(states.values[1, : states.mask[1].sum()], alone.values[0], atol=1e-5, rtol=1e-5)


def test_the_reader_of_the_base_model_does_not_see_the_adapter():
    model, adapter = vlm().eval(), LoRA(rank=2, alpha=4.0)
    before = TextOnlyReader()(model, ["red"], None).values
    adapter.attach(model.parts()["language_model"])
    nn.init.normal_(adapter.layers["model/layers/0/mlp/up_proj"].up)
    assert torch.equal(BaseTextReader()(model, ["red"], None, adapter).values, before)
    assert not torch.allclose(TextOnlyReader()(model, ["red"], None, adapter).values, before)


def test_a_marker_in_a_caption_is_text_that_asks_for_no_image():
    assert TextOnlyReader()(vlm(), ["a <image> circle"], None).values.shape[0] == 1


# -- generating --------------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_caption_and_seed_alone():
    model, own = vlm().eval(), renderer().eval()
    together = stacked(own.generate(model, ["a red circle", "red", "red"], [4, 4, 5]))
    assert together.shape == (3, 3, 8, 8) and together.abs().max() <= 1
    assert_close(own.generate(model, ["red"], [4])[0], together[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1]) and not torch.allclose(together[1], together[2])


def test_the_negative_prompt_takes_the_same_way():
    model, own = vlm().eval(), renderer(guidance=3.0).eval()
    other = renderer(guidance=1.0).eval().generate(model, ["red"], [4])
    assert not torch.allclose(own.generate(model, ["red"], [4])[0], other[0])
    same = own.generate(model, [own.negative_prompt], [4])
    assert_close(same, renderer(guidance=1.0).eval().generate(model, [own.negative_prompt], [4]), atol=1e-4, rtol=1e-4)


def test_noise_of_a_group():
    torch.manual_seed(0)
    shared, apart = SharedNoise()(3, 4), IndependentNoise()(3, 4)
    assert len(shared) == len(apart) == 12 and len(set(shared)) == 3 and len(set(apart)) == 12
    assert shared[:4] == [shared[0]] * 4


def test_sizes_that_disagree_are_named():
    with pytest.raises(ValueError, match="found 9 x 9 px"):
        renderer_of(image_size=9)
    with pytest.raises(ValueError, match="markers"):
        CaptionSampling("Describe the image.")
    with pytest.raises(ValueError, match="group 1"):
        Rollouts(group=1)
    with pytest.raises(ValueError, match="kl_weight"):
        second_stage(["language_model"], adapter=None, objective=GRPO())


def renderer_of(image_size: int) -> CaptionRenderer:
    own = renderer()
    return CaptionRenderer(own.connector, own.decoder, own.codec, own.objective, image_size=image_size)


# -- the first stage ---------------------------------------------------------------------------------------------------------


def test_first_stage_trains_connector_and_decoder():
    method = first_stage(drop_caption=0.0)
    method.training_losses(batch())["loss"].backward()
    assert touched(method) == {"connector", "decoder"}
    with pytest.raises(UserError, match="no caption"):
        method.training_losses(batch(caption=""))


def test_captions_are_left_out_for_guidance(monkeypatch):
    method, seen = first_stage(drop_caption=1.0), []
    condition = method.renderer.condition
    monkeypatch.setattr(method.renderer, "condition", lambda vlm, texts, *rest: seen.extend(texts) or condition(vlm, texts, *rest))
    method.training_losses(batch())
    assert seen == [method.renderer.negative_prompt] * 2


@torch.no_grad()
@pytest.mark.parametrize("make", [first_stage, second_stage, third_stage])
def test_validation_captions_reconstructs_and_compares_the_same_at_every_time(make):
    method = make().eval()
    method.wanted = Wanted(num_generated_batches=1)
    outputs, again = method.validation_step(batch(), 0), method.validation_step(batch(), 0)
    for images_of_rows in (outputs.generated, outputs.from_true_captions, outputs.references):
        assert stacked(images_of_rows).shape == (2, 3, 8, 8)
    assert outputs.answers == again.answers and torch.equal(stacked(outputs.generated), stacked(again.generated))
    assert torch.equal(outputs.scalars["loss"], again.scalars["loss"]) and outputs.caption_tokens.shape == (2,)
    made = {name for name in method.makes if name in outputs.scalars or getattr(outputs, name, None) is not None}
    assert made == set(method.makes) >= outputs.scalars.keys() and ("rewards" in made) == (method.reward is not None)
    beyond = method.validation_step(batch(), 1)  # captions cost little, and metrics of captions look at every batch
    assert beyond.generated is None and len(beyond.answers) == 2
    scored = Means(["mean_caption_tokens"] + ["reward"] * (method.reward is not None))
    for step in (outputs, beyond):
        scored.update(step, batch())
    assert method.reward is None or scored.compute()["reward"] == pytest.approx(float(outputs.scalars["reward"]), abs=1e-6)


def test_stored_latents_take_the_place_of_the_codec(monkeypatch):
    method = first_stage(drop_caption=0.0)
    stored = replace(batch(), extras={"latents": method.precomputable()["latents"].compute(batch())})
    losses = []
    for rows in (batch(), stored):
        torch.manual_seed(3)
        losses.append(method.training_losses(rows)["loss"])
        monkeypatch.setattr(method.renderer.codec, "encode", lambda *_: pytest.fail("encoded"))
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("make", "part"),
    [(first_stage, "language_model"), (second_stage, "decoder"), (third_stage, "connector"), (third_stage, "codec")],
)
def test_parts_that_no_gradient_reaches_are_refused(make, part):
    with pytest.raises(UserError, match=f"training.trained: found '{part}', expected parts that this stage trains"):
        make([part])


# -- use ---------------------------------------------------------------------------------------------------------------------


def test_capabilities():
    one, two, three = first_stage(), second_stage(), third_stage()
    for capability in (Answers, Draws, Reconstructs, ReconstructsFromCaptions):
        assert isinstance(one, capability)
    assert not isinstance(one, RollsOut) and isinstance(two, RollsOut) and isinstance(three, RollsOut)
    assert two.rollout_outputs() is None


def test_a_request_is_read_as_a_caption_and_input_images_are_refused():
    method = first_stage().eval()
    found = method.generate(request_batch(["red", "a red circle"]), [4, 5], Sampling(num_steps=2, guidance=3.0))
    expected = renderer(guidance=3.0).eval().generate(vlm().eval(), ["red"], [4], sampling=Sampling(num_steps=2))
    assert_close(found[:1], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(method.sample(["a red circle"], seed=5), stacked(method.generate(request_batch(["a red circle"]), [5])))
    assert method.generate(request_batch(["red"]), [4], Sampling(size=(4, 8)))[0].shape == (3, 4, 8)
    with pytest.raises(UserError, match="1 input images, expected none") as caught:
        method.generate(request_batch(["red", "Make it green."], [[], list(images(1))]), [4, 4])
    assert caught.value.row == 1


@torch.no_grad()
def test_a_reconstruction_is_generated_from_the_likeliest_caption():
    method = first_stage().eval()
    captions, made = method.reconstruct_from_captions(images(2), [7, 8])
    assert captions == method.answer(replace(batch(), conversations=batch().prompts()), max_new_tokens=5)
    assert torch.equal(stacked(made), stacked(method.generate(request_batch(captions), [7, 8])))
    assert torch.equal(stacked(method.reconstruct(images(2), seed=7)), stacked(made))
    codec = method.renderer.codec
    assert torch.equal(stacked(method.round_trip(images(2))), codec.decode(codec.encode(images(2))).clamp(-1, 1))


# -- the second stage --------------------------------------------------------------------------------------------------------


def test_second_stage_trains_the_adapter_and_nothing_of_the_renderer():
    method = second_stage()
    stir(method)
    losses = method.training_losses(batch())
    losses["loss"].backward()
    assert touched(method) == {"adapter"}
    for name, part in method.parts().items():
        if name != "adapter":
            assert all(p.grad is None for p in part.parameters()), name


@pytest.mark.parametrize("given", [batch, unequal_batch])
@pytest.mark.parametrize("trained", ["adapter", "projector"])
def test_second_stage_gradient_is_the_policy_gradient(given, trained):
    objective = GRPO(kl_weight=0.0, aggregation=SequenceMean())
    method = second_stage([trained], objective=objective, rollouts=Rollouts(3, micro_batch=4))
    stir(method)
    torch.manual_seed(5)
    method.training_losses(given())["loss"].backward()
    rollout = method.rollout
    found = {name: p.grad.clone() for name, p in method.parts()[trained].named_parameters()}
    method.zero_grad()
    total = torch.zeros(())
    for row in range(6):  # each caption scored by itself, from the library's own logits
        image, tokens = rollout.images[row // 3][None], rollout.samples.tokens[row][rollout.samples.mask[row]]
        inputs = method.vlm.embed([[{"role": "user", "text": PROMPT}]], image, [1], for_generation=True)
        whole = method.vlm.with_answers(inputs, tokens[None], torch.ones(1, len(tokens), dtype=torch.bool))
        hidden = method.vlm(whole).hidden[0, -len(tokens) - 1 : -1]
        chosen = method.vlm.model.lm_head(hidden).log_softmax(-1).gather(1, tokens[:, None])
        total = total - rollout.advantages[row] * chosen.mean() / 6
    total.backward()
    for name, parameter in method.parts()[trained].named_parameters():
        assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)
    assert_close(rollout.rewards, Redness()(rollout.generated, batch()).unflatten(0, (2, 3)))


@pytest.mark.parametrize("stage", [second_stage, third_stage])
def test_micro_batches_change_nothing(stage):
    found, group = [], stage().rollouts.group
    for size in (None, 2, 1):
        method = stage(rollouts=Rollouts(group, micro_batch=size))
        torch.manual_seed(6)
        stir(method)
        method.roll_out = whole_rollout(method) if size else method.roll_out
        torch.manual_seed(7)
        losses = method.training_losses(batch())
        losses["loss"].backward()
        part = method.adapter if method.decoder_adapter is None else method.decoder_adapter
        found.append([p.grad.clone() for p in part.parameters()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert_close(one, two, atol=1e-6, rtol=1e-3)


def whole_rollout(method: nn.Module):
    """A rollout in one piece, so that the random numbers of its noise fall alike; scoring stays in pieces."""
    original = type(method).roll_out

    def roll_out(rows: Batch):
        own, method.rollouts = method.rollouts, replace(method.rollouts, micro_batch=None)
        try:
            return original(method, rows)
        finally:
            method.rollouts = own

    return roll_out


def test_second_stage_watches_its_rollout():
    method = second_stage(objective=GRPO(kl_weight=1e-6))
    stir(method)
    losses = method.training_losses(batch())
    assert losses["kl"] > 0 and losses["clip_fraction"] == 0 and losses["entropy"] > 0
    assert 1 <= losses["caption_tokens"] <= 5
    assert {"seconds/caption", "seconds/generate", "seconds/reward", "seconds/score"} <= losses.keys()
    assert_close(losses["reward_std"], method.rollout.rewards.std(dim=1).mean())
    outputs, rows = method.rollout_outputs()
    assert len(outputs.answers) == len(outputs.generated) == len(outputs.references) == len(rows) == 2


class Alike(Reward):
    """The same for all."""

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        return torch.ones(len(candidates))


@pytest.mark.parametrize("stage", [second_stage, third_stage])
def test_groups_without_a_spread_are_not_scored_and_move_nothing(stage, monkeypatch):
    method = stage(reward=Alike())
    monkeypatch.setattr(method, "_part", lambda *_: pytest.fail("scored"))
    losses = method.training_losses(batch())
    losses["loss"].backward()
    assert losses["zero_advantage"] == 1 and not touched(method)


def test_several_updates_on_one_rollout_leave_it_and_the_ratio_moves():
    method = second_stage(rollouts=Rollouts(3, updates_per_rollout=2))
    stir(method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 5.0)
    first = method.training_losses(batch())
    first["loss"].backward()
    optimizer.step()
    kept = method.rollout
    optimizer.zero_grad()
    second = method.training_losses(batch())
    assert method.rollout is kept and "seconds/caption" not in second
    assert second["loss"] != first["loss"] and first["clip_fraction"] == 0 and second["clip_fraction"] > 0
    method.training_losses(batch())
    assert method.rollout is not kept


def test_the_image_is_encoded_once_for_its_group(monkeypatch):
    method, sizes = second_stage(), []
    encode = method.vlm.encode_images
    monkeypatch.setattr(method.vlm, "encode_images", lambda images: sizes.append(len(images)) or encode(images))
    method.training_losses(batch())
    assert sizes == [2]


def test_an_unfrozen_tower_gets_a_gradient():
    method = second_stage(["adapter", "vision_tower"], rollouts=Rollouts(3, micro_batch=2))
    stir(method)
    method.training_losses(batch())["loss"].backward()
    assert touched(method) == {"adapter", "vision_tower"}


# -- the third stage ---------------------------------------------------------------------------------------------------------


def test_third_stage_trains_the_decoders_adapter_and_nothing_else():
    method = third_stage()
    stir(method)
    losses = method.training_losses(batch())
    losses["loss"].backward()
    assert touched(method) == {"decoder_adapter"}
    assert_close(losses["loss"].item(), 0.0, atol=1e-4, rtol=0)  # ratios are one, advantages add up to nothing
    assert losses["ratio_spread"] < 1e-4 and losses["clip_fraction"] == 0


def test_third_stage_trains_on_the_schedule_that_its_images_are_drawn_on():
    method = third_stage()
    drawn = method.renderer.objective.sampling_times(3, 4, 4)
    assert method.objective.times(torch.zeros(1, 4, 4, 4)) == drawn
    assert drawn.times == method.renderer.decoder.schedule(3, 4, 4).times


def test_third_stage_kl_is_against_the_decoder_without_its_adapter():
    method = third_stage(objective=FlowGRPO(num_steps=3, kl_weight=0.1))
    assert method.training_losses(batch())["kl"] == 0
    method.rollout = None
    stir(method)
    assert method.training_losses(batch())["kl"] > 0


def test_checkpoints_hold_what_was_trained_and_later_stages_take_it_over():
    first, second, third = first_stage(), second_stage(), third_stage(adapter=LoRA(rank=2, alpha=4.0))
    with torch.no_grad():
        for parameter in [*first.renderer.parameters(), *second.adapter.parameters()]:
            parameter.add_(1)
    state = {key: value for key, value in first.state_dict().items() if key in first.checkpoint_keys()}
    assert {key.split(".")[1] for key in state} == {"connector", "decoder"}
    second.load_weights(state)
    kept = second.checkpoint_keys()
    assert {key.split(".")[0] for key in kept} == {"renderer", "adapter"}
    third.load_weights({key: value for key, value in second.state_dict().items() if key in kept})
    assert torch.equal(third.renderer.connector.out.weight, first.renderer.connector.out.weight)
    key = "model/layers/1/self_attn/q_proj"
    assert torch.equal(third.adapter.layers[key].up, second.adapter.layers[key].up)
