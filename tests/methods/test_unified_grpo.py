"""UAE's second family: both segments of a sample by one reward; U4 and U6 to U11 are numbers worked out by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from uae_parts import PROMPT, Redness, batch, images, second_stage
from unified_parts import stir, unified_stage

from tests.backbones.janus_parts import janus
from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.image_sampling import draw
from umm_zoo.backbones.unified import guided
from umm_zoo.batch import Batch, stacked
from umm_zoo.errors import UserError
from umm_zoo.methods.uae.captioner_grpo import GenerationForUnderstanding
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.rollouts import IndependentNoise, Rollouts, SharedNoise
from umm_zoo.methods.uae.segments import ImageSampling, SegmentWeights
from umm_zoo.methods.uae.token_renderer import TokenRenderer
from umm_zoo.methods.uae.unified_grpo import UnifiedCaptionAndDrawing
from umm_zoo.objectives.advantages import Advantage, centred
from umm_zoo.objectives.grpo import GRPO, Aggregation, ConstantLength, SequenceMean, TokenMean
from umm_zoo.outputs import Answers, Draws, ReconstructsFromCaptions, RollsOut
from umm_zoo.rewards import Reward

CONDITIONAL = ImageSampling(scoring="conditional")


def gradients(method: UnifiedCaptionAndDrawing) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def touched(method: UnifiedCaptionAndDrawing) -> set[str]:
    return {name for name, part in method.parts().items() if any(p.grad is not None and p.grad.any() for p in part.parameters())}


# -- formulas ----------------------------------------------------------------------------------------------------------------


def test_u4_conditional_scoring_of_guided_draws_has_a_mean_that_is_not_zero():
    conditional, unconditional = torch.tensor([2.0, 0.0, -1.0]).double(), torch.tensor([1.0, 0.0, 0.0]).double()
    chances = guided(conditional, unconditional, 5.0).softmax(0)

    def expected(scale: float) -> Tensor:
        c = conditional.clone().requires_grad_()
        scores = guided(c, unconditional, scale).log_softmax(0)
        return torch.autograd.grad((chances * scores).sum(), c)[0]

    assert_close(expected(1.0), torch.tensor([0.153716, -0.111723, -0.041993]).double(), atol=1e-6, rtol=0)
    assert_close(expected(5.0), torch.zeros(3).double(), atol=1e-12, rtol=0)


class Mean(Advantage):
    """Without the division, so that expectations have a closed form."""

    def __call__(self, rewards: Tensor) -> Tensor:
        return centred(rewards)


def policy_gradient(logits: Tensor, ids: list[int], rewards: Tensor) -> Tensor:
    """That of a group of images of one token."""
    leaf = logits.clone().requires_grad_()
    scores = leaf.log_softmax(0)[torch.tensor(ids)][:, None]
    objective, all_of_them = GRPO(kl_weight=0.0), torch.ones(len(ids), 1, dtype=torch.bool)
    loss = objective(scores, all_of_them, Mean()(rewards[torch.tensor(ids)][None]).flatten())["loss"]
    return torch.autograd.grad(-loss, leaf)[0]


def test_u8_shared_numbers_take_the_gradient_of_one_captions_images_away():
    logits, rewards, places = torch.tensor([0.3, -0.2, 0.0]), torch.tensor([1.0, 0.2, 0.0]), (torch.arange(3000) + 0.5) / 3000
    chances = logits.softmax(0)
    independent = sum(chances[a] * chances[b] * policy_gradient(logits, [a, b], rewards) for a, b in product(range(3), repeat=2))
    truth = chances * (rewards - (chances * rewards).sum())
    assert_close(independent, truth / 2, atol=1e-6, rtol=0)  # (G - 1) / G of it
    assert_close(float(independent[0]), 0.1113, atol=5e-5, rtol=0)
    same = draw(logits.expand(3000, 3), places.double())[0]
    assert all(not policy_gradient(logits, [own, own], rewards).any() for own in same.unique().tolist())


def test_u8_the_gradient_of_captions_is_the_same_with_shared_numbers_and_with_independent_ones():
    tables = torch.tensor([[1.0, 0.0, -0.5], [-0.5, 0.0, 1.0]])
    rewards, places = torch.tensor([1.0, 0.2, 0.0]), ((torch.arange(2000) + 0.5) / 2000).double()
    worth = torch.stack([rewards[draw(table.expand(2000, 3), places)[0]] for table in tables])  # [captions, numbers]
    found = {"shared": 0.0, "independent": 0.0}
    for pair in product((0, 1), repeat=2):  # a group of two, captions of probability 1/2
        score = torch.tensor([0.5 if own == 0 else -0.5 for own in pair])  # of log pi, with respect to the first one's logit
        found["shared"] += float((centred(worth[list(pair)].T) * score).mean(0).sum()) / 2 / 4
        found["independent"] += float((centred(worth[list(pair)].mean(1)[None]) * score).sum()) / 2 / 4
    scaled = {name: value * (7 / 8) / (1 / 2) for name, value in found.items()}  # (G - 1) / G at 8 for that at 2
    assert scaled == {"shared": pytest.approx(0.1068, abs=2e-4), "independent": pytest.approx(0.1068, abs=2e-4)}


@pytest.mark.parametrize(
    ("aggregation", "concatenated", "text", "image"),
    [
        (TokenMean(), True, (1 / 48, 1 / 48), 1 / 48),
        (SequenceMean(), False, (1 / 8, 1 / 24), 1 / 32),
        (ConstantLength(16), False, (1 / 32, 1 / 32), 1 / 32),
        (SequenceMean(), True, (1 / 40, 1 / 56), (1 / 40, 1 / 56)),
    ],
)
def test_u7_weights_of_captions_of_4_and_12_tokens_with_images_of_16(aggregation: Aggregation, concatenated: bool, text, image):
    method = unified_stage(
        objective=GRPO(aggregation=aggregation, kl_weight=0.0), weights=SegmentWeights(concatenated=concatenated)
    )
    mask = torch.arange(12) < torch.tensor([4, 12])[:, None]
    found = method._token_weights(mask, torch.zeros(2, 16, dtype=torch.long))
    assert_close(found[0], mask * torch.tensor(text)[:, None])
    assert_close(found[1], torch.ones(2, 16) * torch.tensor([image]).reshape(-1, 1))
    if isinstance(aggregation, TokenMean):
        assert_close(found[0].sum(), torch.tensor(1 / 3))


def test_u7_of_several_images_a_caption_stands_before_each():
    method = unified_stage(objective=GRPO(aggregation=TokenMean(), kl_weight=0.0), weights=SegmentWeights(concatenated=True))
    mask = torch.arange(6) < torch.tensor([2, 6])[:, None]
    text, image = method._token_weights(mask, torch.zeros(6, 4, dtype=torch.long))  # three images each
    assert_close(text, mask * torch.tensor(3 / 48)) and assert_close(image, torch.full((6, 4), 1 / 48))


class Table(Reward):
    """Rewards as stated."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        return torch.tensor(self.values)


def advantages(*values: float, count: int = 1, **settings: Any) -> tuple[Tensor, Tensor]:
    method = unified_stage(reward=Table(*values), **settings)
    method.training_losses(batch(count))
    return method.rollout.advantages, method.rollout.image_advantages


def test_u9_one_reward_is_that_of_both_segments():
    text, image = advantages(0.9, 0.7, 0.8, 0.6, rollouts=Rollouts(4))
    assert_close(text, torch.tensor([1.160996, -0.386999, 0.386999, -1.160996]), atol=2e-6, rtol=0)
    assert torch.equal(text, image)


def test_several_images_of_a_caption_are_compared_with_each_other_and_captions_by_their_means():
    text, image = advantages(0.9, 0.7, 0.4, 0.6, rollouts=Rollouts(2), images=ImageSampling(per_caption=2))
    assert_close(text, torch.tensor([0.15, -0.15]) / (0.045**0.5 + 1e-4), atol=1e-5, rtol=0)  # of (.8, .5)
    assert_close(image, torch.tensor([0.1, -0.1, -0.1, 0.1]) / (0.02**0.5 + 1e-4), atol=1e-5, rtol=0)


def test_all_images_of_a_row_may_be_compared_as_in_t2i_r1():
    how = ImageSampling(per_caption=2, compared="row")
    text, image = advantages(0.9, 0.7, 0.4, 0.6, rollouts=Rollouts(2), images=how)
    rewards = torch.tensor([0.9, 0.7, 0.4, 0.6])
    assert_close(image, (rewards - rewards.mean()) / (rewards.std() + 1e-4), atol=1e-5, rtol=0)
    assert_close(text, image.view(2, 2).mean(1))


# -- the loss ----------------------------------------------------------------------------------------------------------------


def alone(method: UnifiedCaptionAndDrawing, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities of each caption and each image by itself, out of the library's modules."""
    vlm, rollout, texts, drawn = method.vlm, method.rollout, [], []
    whole: Any = vlm._whole[0]
    per_row, per_caption = method.rollouts.group, method.images.per_caption
    for row, caption in enumerate(rollout.captions):
        tokens = rollout.samples.tokens[row][rollout.samples.mask[row]]
        asked = vlm.embed([[{"role": "user", "text": PROMPT}]], rollout.images[row // per_row][None], [1], for_generation=True)
        states = torch.cat([asked.embeddings[0], whole.model.language_model.embed_tokens(tokens)])[None]
        hidden = whole.model.language_model(inputs_embeds=states, use_cache=False).last_hidden_state[0, -len(tokens) - 1 : -1]
        texts.append(whole.lm_head(hidden).log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        for ids in rollout.image_ids[row * per_caption : (row + 1) * per_caption]:
            prompt = vlm.image_prompt([caption])
            follow = whole.model.generation_aligner(whole.model.generation_embeddings(ids[:-1]))[None]
            logits = []
            for inputs in (prompt, vlm.unconditional(prompt)):
                states = torch.cat([inputs.embeddings, follow], dim=1)
                hidden = whole.model.language_model(inputs_embeds=states, use_cache=False).last_hidden_state
                logits.append(whole.model.generation_head(hidden[0, inputs.embeddings.shape[1] - 1 :]))
            mixed = logits[1] + scale * (logits[0] - logits[1])
            drawn.append(mixed.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    return texts, drawn


@pytest.mark.parametrize("trained", ["adapter", "language_model"])
@pytest.mark.parametrize(("guidance", "scoring", "scale"), [(1.0, "guided", 1.0), (3.0, "guided", 3.0), (3.0, "conditional", 1.0)])
def test_the_gradient_is_that_of_both_policies_each_sample_scored_by_itself(trained: str, guidance: float, scoring, scale: float):
    kl = 0.05 if trained == "adapter" else 0.0
    method = unified_stage(
        [trained],
        guidance,
        objective=GRPO(kl_weight=kl, aggregation=SequenceMean()),
        weights=SegmentWeights(text=0.7, image=1.3),
        images=ImageSampling(per_caption=2, scoring=scoring),
        rollouts=Rollouts(3, micro_batch=4),
    )
    stir(method)
    torch.manual_seed(5)
    found_loss = method.training_losses(batch())["loss"]
    found_loss.backward()
    found, rollout = gradients(method), method.rollout
    method.zero_grad()

    def loss_of(log_probs: list[Tensor], reference: list[Tensor], gains: Tensor) -> Tensor:
        total = torch.zeros(())
        for own, other, gain in zip(log_probs, reference, gains, strict=True):
            gap = other.detach() - own
            total = total - (gain * (own - own.detach()).exp() - kl * (gap.exp() - gap - 1)).mean() / len(log_probs)
        return total

    texts, drawn = alone(method, scale)
    references = (texts, drawn)
    if method.adapter is not None:
        with torch.no_grad(), method.adapter.disabled():
            references = alone(method, scale)
    loss = loss_of(texts, references[0], 0.7 * rollout.advantages) + loss_of(drawn, references[1], 1.3 * rollout.image_advantages)
    loss.backward()
    assert_close(found_loss.detach(), loss.detach(), atol=1e-5, rtol=1e-4)
    expected = gradients(method)
    assert found.keys() >= expected.keys() and touched(method) == {trained}
    for name, value in expected.items():
        assert_close(found[name], value, atol=2e-5, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


def recorded(method: UnifiedCaptionAndDrawing) -> tuple[list[tuple[Tensor, ...]], dict[str, Tensor]]:
    """What goes into the objective, by segment, and the losses of a step at which the adapter is off zero."""
    seen, objective = [], method.objective.__class__.__call__
    original = method.surrogate

    def surrogate(score, mask, advantages, weights, old, rows, first):
        def both():
            seen.append((score().detach(), mask))
            return score()

        return original(both, mask, advantages, weights, old, rows, first)

    method.surrogate = surrogate  # type: ignore[method-assign]
    assert objective is GRPO.__call__
    return seen, method.training_losses(batch())


@pytest.mark.parametrize("per_caption", [1, 2])
def test_the_loss_of_t2i_r1(per_caption: int):
    """One sum over the tokens of both segments, divided by their number; a caption is repeated for each of its images."""
    beta = 0.01
    method = unified_stage(
        guidance=5.0,
        objective=GRPO(kl_weight=beta, aggregation=TokenMean()),
        weights=SegmentWeights(concatenated=True),
        images=ImageSampling(per_caption=per_caption, compared="row", scoring="conditional"),
    )
    seen, losses = recorded(stir(method))
    (policy, mask), (reference, _), (image_policy, image_mask), (image_reference, _) = seen
    rewards = method.rollout.image_rewards.flatten(1)
    gains = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    logs, other, kept = (
        torch.cat([text.repeat_interleave(per_caption, 0), image], dim=1)
        for text, image in ((policy, image_policy), (reference, image_reference), (mask, image_mask))
    )
    terms = gains[:, None] - beta * ((other - logs).exp() - (other - logs) - 1)
    assert_close(losses["loss"].detach(), -(terms * kept).sum() / kept.sum(), atol=1e-6, rtol=1e-5)


def test_the_loss_of_ulm_r1():
    """A mean over the tokens of every sample in each segment, and the two added."""
    beta = 0.02
    method = unified_stage(guidance=5.0, objective=GRPO(kl_weight=beta, aggregation=SequenceMean()), images=CONDITIONAL)
    seen, losses = recorded(stir(method))
    (policy, mask), (reference, _), (image_policy, image_mask), (image_reference, _) = seen
    gains, total = method.rollout.advantages[:, None], torch.zeros(())
    for logs, other, kept in ((policy, reference, mask), (image_policy, image_reference, image_mask)):
        terms = gains - beta * ((other - logs).exp() - (other - logs) - 1)
        total = total - ((terms * kept).sum(1) / kept.sum(1)).mean()
    assert_close(losses["loss"].detach(), total, atol=1e-6, rtol=1e-5)


def test_u6_an_image_is_scored_behind_its_caption_whatever_image_that_describes(monkeypatch):
    method = stir(unified_stage(segments=["image"]))
    torch.manual_seed(5)
    method.training_losses(batch())["loss"].backward()
    before, rollout = gradients(method), method.rollout
    method.zero_grad()
    rollout.images = images(2, seed=9)
    monkeypatch.setattr(method.vlm, "encode_images", lambda *_: pytest.fail("an image was read"))
    method.loss_parts(rollout)[0]()["image_loss"].backward()
    for name, value in gradients(method).items():
        assert torch.equal(before[name], value)
    assert any(value.any() for value in before.values())


@pytest.mark.parametrize("longest", [1, 3, 16, 40])
def test_u10_the_longest_caption_says_nothing_of_the_weight_of_an_image(longest: int):
    method = unified_stage(captions=CaptionSampling(PROMPT, max_new_tokens=longest))
    losses = method.training_losses(batch())
    assert_close(method.rollout.image_weights, torch.full((6, 16), 1 / 96))
    assert losses["at_limit"] >= 0 and torch.equal(method.rollout.advantages, method.rollout.image_advantages)


@pytest.mark.parametrize("trained", ["adapter", "language_model"])
def test_u11_a_step_changes_the_language_model_alone(trained: str):
    method = stir(unified_stage([trained], 3.0))
    assert not method.vlm.codec.training and not method.vlm.vision_tower.training
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1.0)
    method.training_losses(batch())["loss"].backward()
    optimizer.step()
    changed = {
        name.split(".")[0 if trained == "adapter" else 1]
        for name, value in method.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {trained}
    assert {key.split(".")[0 if trained == "adapter" else 1] for key in method.checkpoint_keys()} == {trained}


@pytest.mark.parametrize("part", ["vision_tower", "projector", "codec", "image_embeddings", "image_projector", "image_head"])
def test_what_belongs_to_images_alone_stays_frozen(part: str):
    with pytest.raises(UserError, match=f"training.trained: found '{part}', expected parts that this stage trains: adapter, lang"):
        unified_stage([part])


def test_without_the_segment_text_the_output_layer_of_words_stays_as_it_is():
    method = unified_stage(["language_model"], segments=["image"])
    assert not any(p.requires_grad for p in method.vlm.lm_head.parameters())
    method.training_losses(batch())["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("segments", [["text"], ["image"], ["image", "text"]])
def test_segments_decide_what_is_trained(segments: list[str]):
    method = stir(unified_stage(segments=segments, rollouts=Rollouts(3, updates_per_rollout=2)))
    losses = method.training_losses(batch())
    assert {name for name in losses if name.endswith("_loss")} == {f"{name}_loss" for name in segments}
    assert ("kl" in losses) == ("text" in segments) and ("image_kl" in losses) == ("image" in segments)
    assert (method.rollout.old is not None) == ("text" in segments)
    assert (method.rollout.image_old is not None) == ("image" in segments)


def test_captions_alone_are_the_first_familys_objective_with_this_renderer():
    rollouts, found = Rollouts(3, noise=IndependentNoise()), []
    for kind, more in ((GenerationForUnderstanding, {}), (UnifiedCaptionAndDrawing, {"segments": ["text"]})):
        torch.manual_seed(0)
        adapter, captions = LoRA(rank=2, alpha=4.0), CaptionSampling(PROMPT, max_new_tokens=5)
        method: Any = kind(janus(), TokenRenderer(3.0), Redness(), GRPO(kl_weight=0.1), adapter, captions, rollouts, **more)
        method.train_only(["adapter"])
        stir(method)
        torch.manual_seed(6)
        losses = method.training_losses(batch())
        losses["loss"].backward()
        found.append((losses["reward"], losses["kl"], *(p.grad for p in method.adapter.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_at_guidance_1_no_second_row_is_run(monkeypatch):
    method, rows = unified_stage(), []
    run = method.vlm.run
    monkeypatch.setattr(method.vlm, "run", lambda states, *rest, **more: rows.append(len(states)) or run(states, *rest, **more))
    monkeypatch.setattr(method.vlm, "unconditional", lambda *_: pytest.fail("a second row"))
    method.training_losses(batch())
    assert max(rows) == 6


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_micro_batches_change_nothing(guidance: float):
    found = []
    for size in (None, 4, 1):
        method = stir(unified_stage(guidance=guidance, rollouts=Rollouts(3, micro_batch=size), images=ImageSampling(per_caption=2)))
        torch.manual_seed(7)
        losses = method.training_losses(batch())
        losses["loss"].backward()
        found.append([losses["reward"], *gradients(method).values()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert_close(one, two, atol=1e-6, rtol=1e-3)


def test_old_log_probabilities_are_those_of_the_first_use_and_not_the_samplers():
    method = stir(unified_stage(guidance=3.0, rollouts=Rollouts(3, updates_per_rollout=2, micro_batch=4)))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 2.0)
    first = method.training_losses(batch())
    rollout = method.rollout
    assert_close(rollout.image_old, rollout.image_log_probs, atol=1e-3, rtol=1e-3)
    rollout.image_log_probs.fill_(torch.nan)  # nothing learns from them
    first["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = rollout.image_old.clone()
    second = method.training_losses(batch())
    second["loss"].backward()
    assert method.rollout is rollout and torch.equal(rollout.image_old, kept)
    assert first["image_clip_fraction"] == 0 and second["image_clip_fraction"] > 0
    assert all(value.isfinite().all() for value in gradients(method).values())


def test_the_kl_is_against_the_model_without_its_adapter_under_the_same_scoring():
    for images_of in (ImageSampling(), CONDITIONAL):
        method = unified_stage(guidance=3.0, objective=GRPO(kl_weight=0.1), images=images_of)
        losses = method.training_losses(batch())
        assert losses["kl"] == losses["image_kl"] == 0
        method.window = ()
        assert method.training_losses(batch())["image_kl"] == 0
        stir(method)
        method.window, method.steps_begun = (), 0
        losses = method.training_losses(batch())
        assert losses["kl"] > 0 and losses["image_kl"] > 0


class Alike(Reward):
    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        return torch.ones(len(candidates))


def test_groups_without_a_spread_are_not_scored_and_move_nothing(monkeypatch):
    method = unified_stage(reward=Alike())
    monkeypatch.setattr(method, "surrogate", lambda *_: pytest.fail("scored"))
    losses = method.training_losses(batch())
    losses["loss"].backward()
    assert losses["zero_advantage"] == 1 and not touched(method)


# -- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("rollouts.noise: found SharedNoise, expected IndependentNoise", {"rollouts": Rollouts(3, noise=SharedNoise())}),
        (
            "found SharedNoise, expected IndependentNoise where there are 2 images",
            {"segments": ["text"], "rollouts": Rollouts(3, noise=SharedNoise()), "images": ImageSampling(per_caption=2)},
        ),
        ("expected more than 0 and no top_k", {"renderer": TokenRenderer(1.0, temperature=0.0)}),
        ("expected more than 0 and no top_k", {"renderer": TokenRenderer(1.0, top_k=3)}),
        (
            "images.scoring: found conditional with 2 updates per rollout, expected guided",
            {"guidance": 3.0, "images": CONDITIONAL, "rollouts": Rollouts(3, updates_per_rollout=2)},
        ),
        ("segments: found .*, expected one or both of text, image", {"segments": []}),
        ("segments: found .*, expected one or both of text, image", {"segments": ["text", "picture"]}),
        ("kl_weight: found 1e-06, expected 0 without an adapter", {"trained": ["language_model"], "objective": GRPO()}),
        ("captions.temperature: found 0", {"captions": CaptionSampling(PROMPT, 5, temperature=0.0)}),
    ],
)
def test_settings_that_would_learn_something_else_are_refused(message: str, settings: dict[str, Any]):
    with pytest.raises(ValueError, match=message):
        unified_stage(**settings)


def test_a_renderer_may_share_noise_where_images_are_not_trained_and_score_as_it_likes_at_guidance_1():
    unified_stage(segments=["text"], rollouts=Rollouts(3, noise=SharedNoise()), renderer=TokenRenderer(3.0, top_k=3))
    unified_stage(guidance=1.0, images=CONDITIONAL, rollouts=Rollouts(3, updates_per_rollout=2))


def test_a_model_without_image_tokens_is_refused():
    with pytest.raises(ValueError, match="vlm: found a Qwen25VL, expected a model that generates image tokens"):
        second_stage(renderer=TokenRenderer())


# -- use ---------------------------------------------------------------------------------------------------------------------


def test_capabilities():
    method = unified_stage()
    for capability in (Answers, Draws, ReconstructsFromCaptions, RollsOut):
        assert isinstance(method, capability)
    assert method.rollout_outputs() is None
    method.training_losses(batch())
    outputs, rows = method.rollout_outputs()
    assert len(outputs.answers) == len(outputs.generated) == len(outputs.references) == len(rows) == 2


@torch.no_grad()
def test_questions_are_answered_and_captions_reconstructed():
    method = unified_stage().eval()
    asked = batch()
    asked.meta = [{"task": "questions"}] * 2
    outputs = method.validation_step(asked, 0)
    assert outputs.answers == method.answer(asked, 16) and outputs.generated is None and outputs.counts["reward"] == 0
    described = batch()
    described.tasks = ["caption"] * 2  # type: ignore[list-item]
    outputs = method.validation_step(described, 0)
    assert stacked(outputs.generated).shape == stacked(outputs.from_true_captions).shape == (2, 3, 8, 8)
    assert outputs.rewards.shape == (2,)
    made = {name for name in method.makes if name in outputs.scalars or getattr(outputs, name, None) is not None}
    assert made == set(method.makes) >= outputs.scalars.keys()
    assert isinstance(method.vlm.codec, nn.Module)
